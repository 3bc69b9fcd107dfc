"""Check and normalize addresses from settings, with the parsers of the libraries that use them.

Each function returns the address for its library, or raises `ValueError` with a sentence that has
no part of the address, because an address may contain a password.
"""

import os
import re
import ssl
from ipaddress import IPv6Address
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

PORT: Final = r"([1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])"
HOST: Final = r"(\[[0-9a-fA-F:.%\w]+\]|[^\s:/@?#,\[\]]+)"
REDIS: Final = "redis://[user:password@]host:port/db, or rediss:// for TLS"
DATABASE: Final = "postgresql://user:password@host:port/db"

_ENCODE: Final = (
    "write @ # ? / [ ] and % in a user or a password as %40 %23 %3F %2F %5B %5D and %25"
)
_NETWORK_PART: Final = re.compile(
    rf"(?P<user>[^@]*@)?(?P<hosts>{HOST}(:{PORT})?(,{HOST}(:{PORT})?)*)?", re.ASCII
)

_REDIS_OPTIONS: Final = frozenset({"db", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})
_REDIS_IGNORED: Final = frozenset(
    {
        "client_name", "decode_responses", "encoding", "health_check_interval", "max_connections",
        "protocol", "retry_on_timeout", "socket_connect_timeout", "socket_keepalive",
        "socket_read_size", "socket_timeout", "ssl_check_hostname", "timeout",
    }
)  # fmt: skip
"""Options that the engine sets itself. Any value is accepted and has no effect."""

_DATABASE_OPTIONS: Final = frozenset(
    {
        # asyncpg's own
        "database", "dbname", "gsslib", "host", "krbsrvname", "passfile", "password", "port",
        "ssl_max_protocol_version", "ssl_min_protocol_version", "sslcert", "sslcrl", "sslkey",
        "sslmode", "sslnegotiation", "sslpassword", "sslrootcert", "target_session_attrs", "user",
        # settings of the session, which asyncpg hands to the server
        "application_name", "idle_in_transaction_session_timeout", "idle_session_timeout",
        "lock_timeout", "options", "search_path", "statement_timeout", "tcp_keepalives_count",
        "tcp_keepalives_idle", "tcp_keepalives_interval",
    }
)  # fmt: skip
_DATABASE_IGNORED: Final = frozenset(
    {
        "connect_timeout", "connection_limit", "fallback_application_name", "gssdelegation",
        "keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval",
        "load_balance_hosts", "max_protocol_version", "min_protocol_version", "pgbouncer",
        "pool_timeout", "prepared_statement_cache_size", "sslcompression", "sslkeylogfile",
        "sslsni", "statement_cache_size", "tcp_user_timeout",
    }
)  # fmt: skip
"""Options of libpq and of common clients that asyncpg lacks. Any value has no effect."""
_DATABASE_REFUSED: Final = {
    "channel_binding": "asyncpg has no channel binding: remove channel_binding=require",
    "client_encoding": "the engine uses UTF-8: remove client_encoding",
    "gssencmode": "asyncpg does not encrypt by GSSAPI: remove gssencmode=require",
    "hostaddr": "asyncpg does not know hostaddr: write the address as host",
    **dict.fromkeys(
        ("oauth_issuer", "oauth_client_id", "oauth_client_secret", "oauth_scope"),
        "asyncpg does not know OAuth: write a user and a password",
    ),
    "replication": "the engine does not replicate: remove replication",
    "require_auth": "asyncpg does not know require_auth: remove it",
    "requirepeer": "asyncpg does not know requirepeer: remove it",
    "requiressl": "asyncpg does not know requiressl: write sslmode=require",
    "schema": "PostgreSQL has no option schema: write search_path",
    **dict.fromkeys(
        ("scram_client_key", "scram_server_key"),
        "asyncpg does not know SCRAM keys: write the password",
    ),
    "service": "service files are not read: write the address in full",
    "servicefile": "service files are not read: write the address in full",
    "ssl": "PostgreSQL has no option ssl: write sslmode=require",
    "sslcertmode": "asyncpg does not know sslcertmode=require: remove it",
    "sslcrldir": "asyncpg does not know sslcrldir: name one file with sslcrl",
}
_DATABASE_DEFAULTS: Final = {
    "channel_binding": ("prefer", "disable"),
    "client_encoding": ("utf8", "utf-8", "auto"),
    "gssencmode": ("prefer", "disable"),
    "requiressl": ("0",),
    "ssl": ("false",),
    "sslcertmode": ("allow", "disable"),
}
"""Values with which a refused option asks for nothing."""


def with_hosts(text: str) -> str:
    """Returns the text, whose hosts are separated by commas and can be looked up."""
    for host in re.findall(r"\[([^\]]*)\]", text):
        try:
            IPv6Address(host)
        except ValueError:
            raise ValueError("a host in brackets is no IPv6 address") from None
    for each in text.rpartition("@")[2].split(","):
        host = unquote(each.partition(":")[0])
        try:
            if not host.startswith("/"):  # a socket of PostgreSQL
                host.encode("idna")  # as a look-up does
        except UnicodeError:
            raise ValueError("each part of a host's name has 1 to 63 characters") from None
    return text


def redis_url(url: str) -> str:
    """Returns the URL without the options that the engine sets itself."""
    from redis.asyncio.connection import parse_url  # noqa: PLC0415 - the consumer has no Redis

    scheme, hosts, options = _parts(url, ("redis", "rediss"))
    if not hosts or "," in hosts:
        raise ValueError("name one host" if hosts else "the host is missing")
    path = urlsplit(url).path
    if not re.fullmatch(r"/?|/\d+", path, re.ASCII):
        raise ValueError("the path is the number of a database, such as /0")
    if not re.fullmatch(r"\d*", options.get("db", ""), re.ASCII):
        raise ValueError("the option db is the number of a database, such as 0")
    if path.strip("/") and "db" in options:
        raise ValueError("the path and the option db both name a database: remove one")
    if options.pop("ssl_cert_reqs", "required").lower() not in ("required", "cert_required"):
        raise ValueError(
            "certificates are always verified: remove ssl_cert_reqs, and name the server's own "
            "authority with the option ssl_ca_certs or with SSL_CERT_FILE"
        )
    kept = _known(options, _REDIS_OPTIONS, _REDIS_IGNORED)
    if scheme == "redis" and any(name.startswith("ssl_") for name in kept):
        raise ValueError("the options of TLS need rediss://")
    if scheme == "rediss":
        _check_certificates(kept)
    clean = url.partition("?")[0] + (f"?{urlencode(kept)}" if kept else "")
    try:
        parse_url(clean)
    except ValueError:  # its text can have a part of the password
        raise ValueError(f"redis-py cannot read it: {_ENCODE}") from None
    return clean


def _check_certificates(options: dict[str, str]) -> None:
    # Python ignores a wrong SSL_CERT_FILE silently, and then trusts no authority.
    authorities = options.get("ssl_ca_certs") or os.environ.get("SSL_CERT_FILE")
    try:
        context = ssl.create_default_context(cafile=authorities)
        if certificate := options.get("ssl_certfile"):
            # Without a password, an encrypted key would ask for one on the terminal.
            context.load_cert_chain(certificate, options.get("ssl_keyfile"), password="")
    except OSError:
        names = sorted(name for name in options if name.startswith("ssl_"))
        if "ssl_ca_certs" not in options and authorities:
            names.append("SSL_CERT_FILE")
        raise ValueError(f"a file is missing or not in PEM: {', '.join(names)}") from None


def database_url(url: str) -> str:
    """Returns the URL without the options that have no effect on asyncpg."""
    _, hosts, options = _parts(url, ("postgres", "postgresql"))
    _refuse_other_readings(url, options)
    if not hosts and not options.get("host"):
        raise ValueError("the host is missing")
    with_hosts(options.get("host", ""))
    if options.get("sslrootcert") == "system":
        raise ValueError(
            "asyncpg does not know sslrootcert=system: name the system's file, such as "
            "sslrootcert=/etc/ssl/certs/ca-certificates.crt"
        )
    for name, why in _DATABASE_REFUSED.items():
        value = options.pop(name, None)
        if value is not None and value.lower() not in _DATABASE_DEFAULTS.get(name, ()):
            raise ValueError(why)
    kept = _known(options, _DATABASE_OPTIONS, _DATABASE_IGNORED)
    front = url.partition("?")[0]
    if "[" in hosts and "," in hosts:
        # asyncpg splits the address with Python's parser. Its newer releases refuse a list of hosts
        # with an IPv6 address there, and the option `host` can have one.
        front, kept["host"] = front.replace(hosts, "", 1), unquote(hosts)
    clean = front + (f"?{urlencode(kept)}" if kept else "")
    _parse_database(clean, kept)
    return clean


def _refuse_other_readings(url: str, options: dict[str, str]) -> None:
    """Raises `ValueError` for an option that asyncpg ignores, or does not read as libpq does.

    libpq prefers the option, and asyncpg the part of the address in front of the question mark.
    """
    network, slash, _ = url.partition("://")[2].partition("?")[0].partition("/")
    login, _, hosts = network.rpartition("@")
    user, _, password = login.partition(":")
    front = {"host": hosts, "port": hosts, "user": user, "password": password}
    # asyncpg reads a database without a name from a path without one.
    for name, given in (front | dict.fromkeys(("dbname", "database"), slash)).items():
        if given and name in options:
            raise ValueError(
                f"asyncpg ignores the option {name} here: write it in front of the question mark"
            )
    # asyncpg reads a plus sign as a space. In `options`, that is often meant.
    if plus := re.search(r"[?&](user|password|dbname|database)=[^&]*\+", url):
        raise ValueError(f"write + in the option {plus[1]} as %2B, and a space as %20")
    if options.keys() >= {"dbname", "database"}:
        raise ValueError("the options dbname and database are the same: remove one")
    if "port" in options and re.search(r":\d+(,|$)", options.get("host", "")):
        raise ValueError("the option host has a port, too: remove one")


def _parse_database(url: str, options: dict[str, str]) -> None:
    from asyncpg import connect_utils  # noqa: PLC0415 - the API has no ledger
    from asyncpg.exceptions import InterfaceError  # noqa: PLC0415

    try:
        # asyncpg has no public parser. It parses when it connects, and its errors show the address.
        parse: Any = vars(connect_utils)["_parse_connect_dsn_and_args"]
        parse(
            dsn=url, host=None, port=None, user=None, password=None, passfile=None, database=None,
            ssl=None, service=None, servicefile=None, direct_tls=None, server_settings=None,
            target_session_attrs=None, krbsrvname=None, gsslib=None,
        )  # fmt: skip
    except KeyError:
        raise ValueError("the user is missing") from None
    except (InterfaceError, OSError, ValueError) as error:
        if (files := _database_files(options)) and isinstance(error, OSError):
            why = f"a file is missing, or has no certificate or key in PEM: {', '.join(files)}"
        elif options.get("sslmode") in ("verify-ca", "verify-full") and not (
            {"sslrootcert", "PGSSLROOTCERT"} & {*files}
        ):
            why = (
                "sslmode needs the option sslrootcert, a file of trusted certificates in PEM, or "
                "the variable PGSSLROOTCERT"
            )
        elif "direct TLS" in str(error):
            why = "sslnegotiation=direct needs sslmode=require, verify-ca or verify-full"
        elif "sslmode" in str(error):
            why = "sslmode is disable, allow, prefer, require, verify-ca or verify-full"
        elif "TLS version" in str(error):
            why = "ssl_min_protocol_version and ssl_max_protocol_version are like TLSv1.3"
        elif wrong := [name for name in options if name in str(error)]:
            why = f"the option {wrong[0]} has a wrong value"
        else:
            why = f"asyncpg cannot read it: {_ENCODE}"
        raise ValueError(why) from None


def _database_files(options: dict[str, str]) -> list[str]:
    """Returns the options and the variables that name files of TLS. asyncpg prefers an option."""
    given: list[str] = []
    for name in ("sslrootcert", "sslcert", "sslkey", "sslcrl"):
        if name in options:
            given.append(name)
        elif os.environ.get(variable := f"PG{name.upper()}"):
            given.append(variable)
    return given


def _parts(url: str, schemes: tuple[str, ...]) -> tuple[str, str, dict[str, str]]:
    """Returns the scheme, the hosts and the options of a URL that has only one reading."""
    scheme, separator, rest = url.partition("://")
    if scheme not in schemes or not separator:
        raise ValueError(f"the scheme is {' or '.join(schemes)}")
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise ValueError("it has a space or a control character")
    before_query, _, query = rest.partition("?")
    network, _, path = before_query.partition("/")
    if "#" in rest or "@" in path or "@" in query or network.count("@") > 1:
        raise ValueError(_ENCODE)
    found = _NETWORK_PART.fullmatch(network)
    user = network.rpartition("@")[0]
    if found is None or set("[]") & set(user):
        raise ValueError("a host or a port is wrong" if not user else _ENCODE)
    with_hosts(network)
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise ValueError(f"options are written ?name=value&name=value; {_ENCODE}") from None
    return scheme, found["hosts"] or "", options


def _known(
    options: dict[str, str], used: frozenset[str], ignored: frozenset[str]
) -> dict[str, str]:
    """Returns the options that are used. Raises `ValueError` for one that nothing knows."""
    if set(options) - used - ignored:
        raise ValueError(f"it has an unknown option; known are {', '.join(sorted(used))}")
    return {name: value for name, value in options.items() if name in used}
