"""Addresses are read once, by the libraries that use them, and no error shows a part of one."""

import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit

import pytest
from aiokafka.conn import collect_hosts
from asyncpg import connect_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio.connection import parse_url

from flashsale import ledger, redis_client
from flashsale.errors import LedgerUnavailable, SettingsError
from flashsale.settings import DatabaseUrl, EngineSettings, KafkaSettings, RedisUrl, load
from flashsale_api.settings import Settings as ApiSettings
from tests.support.certificates import certificate
from tests.support.environments import without_servers
from tests.support.paths import ROOT

SECRETS: Final = ("s3cretA", "s3cretB", "987654")
PASSWORDS: Final = (
    "s3cretA#s3cretB",
    "987654#s3cretB",
    "s3cretA/s3cretB",
    "987654/s3cretB",
    "s3cretA?s3cretB",
    "987654?s3cretB",
    "s3cretA[s3cretB",
    "s3cretA]s3cretB",
    "s3cretA@s3cretB",
    "s3cretA s3cretB",
    "s3cretA:s3cretB@987654",
)
# PostgreSQL 18's documentation, section 32.1.2, without `sslmode`, which the test sets.
LIBPQ: Final = """
host hostaddr port dbname user password passfile require_auth channel_binding connect_timeout
client_encoding options application_name fallback_application_name keepalives keepalives_idle
keepalives_interval keepalives_count tcp_user_timeout replication gssencmode requiressl
sslnegotiation sslcompression sslcert sslkey sslkeylogfile sslpassword sslcertmode sslrootcert
sslcrl sslcrldir sslsni requirepeer ssl_min_protocol_version ssl_max_protocol_version
min_protocol_version max_protocol_version krbsrvname gsslib gssdelegation scram_client_key
scram_server_key service servicefile target_session_attrs load_balance_hosts oauth_issuer
oauth_client_id oauth_client_secret oauth_scope
"""
MODULES: Final = ("flashsale_api", "flashsale_consumer", "flashsale_operator", "flashsalectl")


class Redis(EngineSettings, frozen=True):
    redis_url: RedisUrl


class Database(EngineSettings, frozen=True):
    database_url: DatabaseUrl


def redis(url: str) -> str:
    return load(Redis, {"FLASHSALE_REDIS_URL": url}).redis_url


def database(url: str) -> str:
    return load(Database, {"FLASHSALE_DATABASE_URL": url}).database_url


def refused(read: Callable[[str], str], url: str) -> str:
    with pytest.raises(SettingsError) as wrong:
        read(url)
    text = str(wrong.value)
    assert "\n" not in text
    assert not [secret for secret in SECRETS if secret in text]
    return text


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_password_with_a_special_character_is_explained(password: str) -> None:
    for user in ("", "ann"):
        for host in ("h", "h:6379", "h:6379/0"):
            text = refused(redis, f"redis://{user}:{password}@{host}")
            assert " " in password or "%23 %3F %2F" in text
            text = refused(database, f"postgresql://{user}:{password}@{host}")
            assert " " in password or "%23 %3F %2F" in text


@settings(deadline=None)  # no timing is asserted
@given(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1))
def test_an_encoded_password_reaches_both_servers_unchanged(password: str) -> None:
    url = redis(f"redis://ann:{quote(password, safe='')}@h:6380/2")
    found = parse_url(url)
    assert (found["password"], found["host"], found["port"], found["db"]) == (
        password,
        "h",
        6380,
        2,
    )
    parse = vars(connect_utils)["_parse_connect_dsn_and_args"]
    names = list(signature(parse).parameters)
    url = database(f"postgresql://ann:{quote(password, safe='')}@h/db")
    _, connection = parse(**{name: None for name in names if name != "dsn"}, dsn=url)
    assert (connection.user, connection.password) == ("ann", password)


@settings(deadline=None)  # no timing is asserted
@given(st.text(st.sampled_from("ab1:@#?/[]%&=\n ,."), max_size=30))
def test_no_address_raises_anything_but_a_settings_error(text: str) -> None:
    for read, scheme in ((redis, "redis"), (redis, "rediss"), (database, "postgresql")):
        for url in (text, f"{scheme}://{text}", f"{scheme}://u:{text}@h/0", f"{scheme}://h/{text}"):
            try:
                clean = read(url)
            except SettingsError as error:
                assert "\n" not in str(error)  # noqa: PT017 - not every address is wrong
            else:
                assert urlsplit(clean).hostname or "host=" in clean


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h:6380/", "h:6380/0"),
        ("redis://h:6380?db=4", "h:6380/4"),
        ("redis://h:6380/?db=4", "h:6380/4"),
        ("redis://h:6380/3?health_check_interval=30&socket_timeout=60", "h:6380/3"),
        ("redis://h:6380/3?retry_on_timeout=true&decode_responses=no&protocol=3", "h:6380/3"),
        ("redis://h:6380/3\n", "h:6380/3"),
        ("redis://h:6380/3\r\n", "h:6380/3"),
        ("redis://[::1]/", "::1:6379/0"),
    ],
)
def test_harmless_options_of_redis_are_accepted(url: str, address: str) -> None:
    client = redis_client.connect(redis(url))
    assert redis_client.address(client) == address
    options = client.connection_pool.connection_kwargs
    assert (options["socket_timeout"], options["decode_responses"]) == (2, True)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://h/0?ssl_cert_reqs=none", "certificates are always verified"),
        ("rediss://h/0?ssl_cert_reqs=none", "ssl_ca_certs or with SSL_CERT_FILE"),
        ("redis://h/0?ssl_ca_certs=ca.crt", "the options of TLS need rediss://"),
        ("rediss://h/0?ssl_ca_certs=/missing", "missing or not in PEM: ssl_ca_certs"),
        ("redis://h/0?s3cretA=1", "an unknown option; known are db, ssl_ca_certs"),
        ("redis://h/s3cretA", "the path is the number of a database"),
        ("redis://h/0?db=s3cretA", "the option db is the number of a database"),
        ("redis://h/0?db", "options are written ?name=value"),
        ("redis://:6379", "a host or a port is wrong"),
        ("redis://u:s3cretA@", "the host is missing"),
        ("redis://a,b", "name one host"),
        ("unix:///run/redis.sock", "the scheme is redis or rediss"),
        ("redis://:s3cretA@[s3cretB]:6379/0", "a host in brackets is no IPv6 address"),
    ],
)
def test_a_wrong_option_of_redis_is_explained(url: str, words: str) -> None:
    assert words in refused(redis, url)


@pytest.mark.parametrize(
    "options",
    [
        "connect_timeout=10&keepalives=1&keepalives_idle=30&tcp_user_timeout=1000",
        "channel_binding=prefer&gssencmode=disable&sslsni=1&client_encoding=UTF8",
        "pgbouncer=true&statement_cache_size=0&application_name=shop",
        "sslmode=require&target_session_attrs=read-write",
    ],
)
def test_harmless_options_of_libpq_are_accepted(options: str) -> None:
    clean = database(f"postgresql://u:p@h:5432/db?{options}")
    assert "connect_timeout" not in clean
    assert "pgbouncer" not in clean
    assert ("sslmode=require" in clean) == ("sslmode" in options)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://u:p@h/db?channel_binding=require", "remove channel_binding=require"),
        ("postgresql://u:p@h/db?client_encoding=latin1", "the engine uses UTF-8"),
        ("postgresql://u:p@h/db?require_auth=scram-sha-256", "does not know require_auth"),
        ("postgresql://u:p@h/db?sslmode=s3cretA", "sslmode is disable, allow"),
        ("postgresql://u:p@h/db?sslmode=verify-full", "sslmode needs the option sslrootcert"),
        (
            "postgresql://u:p@h/db?sslmode=verify-ca&sslrootcert=/missing",
            "missing, or has no certificate or key in PEM: sslroot",
        ),
        ("postgresql://u:p@h/db?sslmode=verify-full&sslrootcert=system", "ca-certificates.crt"),
        ("postgresql://u:p@h/db?s3cretA=1", "an unknown option"),
        ("postgresql://u@h/db?password=s3cretA+s3cretB", "write + in the option password as %2B"),
        ("postgresql://h?user=s3cretA+s3cretB&dbname=shop", "write + in the option user as %2B"),
        ("postgresql:///db", "the host is missing"),
        ("postgresql://u:s3cretA@[s3cretB]/db", "a host in brackets is no IPv6 address"),
        ("postgresql://u:p@h/db?gssencmode=require", "remove gssencmode=require"),
        ("postgresql://u:p@h/db?sslcertmode=require", "remove it"),
        ("postgresql://u:p@h/db?ssl=true", "write sslmode=require"),
        ("postgresql://u:p@h/db?schema=s3cretA", "write search_path"),
        ("postgresql://u:p@h/db?oauth_client_secret=s3cretA", "write a user and a password"),
        ("postgresql://u:p@h/db?sslnegotiation=direct", "direct needs sslmode=require"),
        ("postgresql://u:p@h/db?sslnegotiation=s3cretA", "sslnegotiation has a wrong value"),
        ("postgresql://u:p@h/db?target_session_attrs=s3cretA", "attrs has a wrong value"),
        (
            "postgresql://u:p@h/db?sslmode=require&ssl_min_protocol_version=s3cretA",
            "ssl_max_protocol_version are like TLSv1.3",
        ),
    ],
)
def test_a_wrong_option_of_postgresql_is_explained(url: str, words: str) -> None:
    assert words in refused(database, url)


def test_a_wrong_file_of_authorities_for_redis_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.crt"))
    assert redis("redis://h/0") == "redis://h/0"
    assert "missing or not in PEM: SSL_CERT_FILE" in refused(redis, "rediss://h/0")
    (tmp_path / "ca.crt").touch()  # as a file of a Secret can be
    assert "missing or not in PEM: SSL_CERT_FILE" in refused(redis, "rediss://h/0")
    certificate(tmp_path)
    assert redis("rediss://h/0") == "rediss://h/0"


@pytest.mark.parametrize("variable", ["PGSSLROOTCERT", "PGSSLCERT", "PGSSLKEY", "PGSSLCRL"])
async def test_a_variable_that_names_a_wrong_file_is_named(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate(tmp_path)
    files = {"PGSSLROOTCERT": "ca.crt", "PGSSLCERT": "server.pem", "PGSSLKEY": "server.pem"}
    for name, file in files.items():
        monkeypatch.setenv(name, str(tmp_path / file))
    url = "postgresql://u:p@127.0.0.1:1/db?sslmode=verify-full"
    clean = database(url)
    pool = await ledger.connect(clean)
    wrong = tmp_path / "wrong.pem"
    wrong.touch()  # as a file of a Secret can be
    monkeypatch.setenv(variable, str(wrong))
    assert variable in refused(database, url)
    wrong.unlink()
    assert variable in refused(database, url)
    with pytest.raises(LedgerUnavailable, match=f"a file is missing, .*{variable}"):
        await pool.fetchval("SELECT 1")
    pool.terminate()


@pytest.mark.parametrize(
    ("url", "option"),
    [
        ("postgresql://u:p@h/db?port=6432", "port"),
        ("postgresql://u:p@h:5432/db?host=s3cretA", "host"),
        ("postgresql://u:p@a,b/db?host=s3cretA", "host"),
        ("postgresql://u@h/db?user=s3cretA", "user"),
        ("postgresql://u:p@h/db?sslmode=require&password=s3cretA", "password"),
        ("postgresql://u:p@h/db?dbname=s3cretA", "dbname"),
        ("postgresql://u:p@h/?dbname=s3cretA", "dbname"),
        ("postgresql://u:p@h/db?database=s3cretA", "database"),
    ],
)
def test_an_option_of_postgresql_that_the_front_hides_is_refused(url: str, option: str) -> None:
    assert f"asyncpg ignores the option {option} here" in refused(database, url)


@pytest.mark.parametrize(
    ("read", "url"),
    [
        (database, "postgresql://u:p@?host=h&dbname=a&database=s3cretA"),
        (database, "postgresql://u:p@/db?host=h:5432&port=6432"),
        (redis, "redis://h/3?db=4"),
    ],
)
def test_two_options_for_one_part_are_refused(read: Callable[[str], str], url: str) -> None:
    assert "remove one" in refused(read, url)


def test_every_part_of_a_database_address_can_be_an_option() -> None:
    clean = database("postgresql://?host=h&port=6432&user=ann&password=a%2Bb%20c&dbname=shop")
    parse = vars(connect_utils)["_parse_connect_dsn_and_args"]
    names = list(signature(parse).parameters)
    hosts, found = parse(**{name: None for name in names if name != "dsn"}, dsn=clean)
    assert (hosts, found.user, found.password, found.database) == (
        [("h", 6432)],
        "ann",
        "a+b c",
        "shop",
    )
    assert database("postgresql://u@/db?host=/run/postgresql&port=6432").endswith("port=6432")


@pytest.mark.parametrize(
    ("address", "hosts"),
    [
        ("a:1,[::1]:2", [("a", 1), ("::1", 2)]),
        ("[::1]:2,a", [("::1", 2), ("a", 5432)]),
        ("[::1],[::2]", [("::1", 5432), ("::2", 5432)]),
        ("[fe80::1%25eth0]:1,%2Frun", [("fe80::1%eth0", 1), "/run/.s.PGSQL.5432"]),
    ],
)
def test_an_ipv6_address_can_be_one_of_several_hosts(address: str, hosts: list[object]) -> None:
    clean = database(f"postgresql://u:p@{address}/db?sslmode=prefer")
    parse = vars(connect_utils)["_parse_connect_dsn_and_args"]
    names = list(signature(parse).parameters)
    found, login = parse(**{name: None for name in names if name != "dsn"}, dsn=clean)
    assert (found, login.user, login.password, login.database) == (hosts, "u", "p", "db")


@pytest.mark.parametrize("option", LIBPQ.split())
def test_every_option_of_libpq_is_accepted_or_explained(option: str) -> None:
    try:
        database(f"postgresql://u:p@h/db?sslmode=prefer&{option}=s3cretA")
    except SettingsError as error:
        for unclear in ("unknown option", "%40", "s3cretA"):
            assert unclear not in str(error)  # noqa: PT017 - some options are accepted


@pytest.mark.parametrize("host", ["[s3cretA]", "[fd00::g]", "[127.0.0.1]", "[1:2:3:4:5:6:7:8:9]"])
def test_brackets_around_another_host_are_a_mistake(host: str) -> None:
    for variable, value in (
        ("FLASHSALE_KAFKA_BOOTSTRAP", f"a:1,{host}:9092"),
        ("FLASHSALE_REDIS_URL", f"redis://{host}:6379"),
        ("FLASHSALE_METRICS_LISTEN", f"{host}:9090"),
    ):
        environ = {"FLASHSALE_REDIS_URL": "redis://h", "FLASHSALE_KAFKA_BOOTSTRAP": "a:1"}
        with pytest.raises(SettingsError, match=f"{variable} is wrong: expected ") as wrong:
            load(ApiSettings, environ | {variable: value})
        assert "s3cret" not in str(wrong.value)


@pytest.mark.parametrize(
    ("bootstrap", "hosts"),
    [
        ("a:9092", [("a", 9092)]),
        ("a:9092,b:9093\n", [("a", 9092), ("b", 9093)]),
        ("[::1]:9092,[2001:db8::2]:9093", [("::1", 9092), ("2001:db8::2", 9093)]),
        ("[fe80::1%eth0]:9092", [("fe80::1%eth0", 9092)]),
    ],
)
def test_brokers_are_read_as_aiokafka_reads_them(
    bootstrap: str, hosts: list[tuple[str, int]]
) -> None:
    found = load(KafkaSettings, {"FLASHSALE_KAFKA_BOOTSTRAP": bootstrap}).kafka_bootstrap
    assert [each[:2] for each in collect_hosts(found, randomize=False)] == hosts


def test_every_variable_loses_the_newline_of_its_secret() -> None:
    environ = {
        "FLASHSALE_KAFKA_BOOTSTRAP": "a:9092\n",
        "FLASHSALE_KAFKA_USER": "ann\n",
        "FLASHSALE_KAFKA_PASSWORD": "s3cretA \r\n",
        "FLASHSALE_ENGINE": "shop\n",
    }
    loaded = load(KafkaSettings, environ)
    client = loaded.kafka_client()
    assert (client["sasl_plain_username"], client["sasl_plain_password"]) == ("ann", "s3cretA ")
    assert loaded.engine == "shop"


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("variable", ["FLASHSALE_REDIS_URL", "FLASHSALE_DATABASE_URL"])
def test_a_wrong_address_ends_a_process_with_one_line(
    module: str, variable: str, tmp_path: Path
) -> None:
    if (module, variable) in {
        ("flashsale_api", "FLASHSALE_DATABASE_URL"),
        ("flashsale_consumer", "FLASHSALE_REDIS_URL"),
    }:
        return  # the process does not read this variable
    environ = without_servers(tmp_path)
    scheme = environ[variable].partition(":")[0]
    environ[variable] = f"{scheme}://u:s3cretA#s3cretB@h/0"
    program = [str(Path(sys.executable).with_name(module)), "get"]
    if module != "flashsalectl":
        program = [sys.executable, "-m", module]
    done = subprocess.run(
        program, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert f"{variable} is wrong: expected {scheme}://" in done.stderr
    assert not [secret for secret in SECRETS if secret in done.stderr]
