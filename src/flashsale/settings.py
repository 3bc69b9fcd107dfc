"""Reads settings from `FLASHSALE_*` environment variables, which all processes share."""

import os
import ssl
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from flashsale import addresses
from flashsale.addresses import HOST, PORT
from flashsale.errors import SettingsError
from flashsale.keys import DEFAULT_ENGINE
from flashsale.tls import RenewedContext, relaxed, stamp

PREFIX: Final = "FLASHSALE_"

RedisUrl = Annotated[str, Meta(description=addresses.REDIS, extra={"read": addresses.redis_url})]
KafkaBootstrap = Annotated[
    str,
    Meta(
        pattern=rf"^{HOST}:{PORT}(,{HOST}:{PORT})*\Z",
        description="host:port[,host:port...], with an IPv6 address in brackets",
        extra={"read": addresses.with_hosts},
    ),
]
DatabaseUrl = Annotated[
    str, Meta(description=addresses.DATABASE, extra={"read": addresses.database_url})
]
Listen = Annotated[
    str,
    Meta(
        pattern=rf"^{HOST}:(0|{PORT})\Z",
        description="host:port; [::] is every address of IPv4 and IPv6",
        extra={"read": addresses.with_hosts},
    ),
]

EngineName = Annotated[
    str,
    Meta(
        pattern=r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?\Z",
        description="1 to 63 characters of a-z, 0-9 and -, with a letter first and no - last",
    ),
]
SaslMechanism = Annotated[
    Literal["SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN"],
    Meta(description="SCRAM-SHA-512, SCRAM-SHA-256 or PLAIN"),
]
Flag = Annotated[bool, Meta(description="true or false")]

S = TypeVar("S", bound=msgspec.Struct)

KAFKA_HELP: Final = """\
  FLASHSALE_ENGINE           name of the engine, the prefix of its topics, consumer group and
                             Redis keys (default flashsale)
  FLASHSALE_KAFKA_BOOTSTRAP  Kafka's brokers, host:port[,host:port...] (required)
  FLASHSALE_KAFKA_TLS        true or false (default false)
  FLASHSALE_KAFKA_CA_FILE    certificates to trust, in PEM (default: the system's)
  FLASHSALE_KAFKA_CERT_FILE  the client's certificate, in PEM (default: none)
  FLASHSALE_KAFKA_KEY_FILE   the certificate's key, in PEM and without a password
  FLASHSALE_KAFKA_USER       user (default: no authentication by password)
  FLASHSALE_KAFKA_PASSWORD   that user's password
  FLASHSALE_KAFKA_SASL_MECHANISM
                             SCRAM-SHA-512, SCRAM-SHA-256 or PLAIN (default SCRAM-SHA-512)
"""
"""The variables of `KafkaSettings`, for the --help of each process."""


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's name, which is the prefix of its topics, consumer group and Redis keys."""

    engine: EngineName = DEFAULT_ENGINE


class KafkaSettings(EngineSettings, frozen=True, kw_only=True):
    """Kafka's address, and optionally TLS, a client certificate and a user."""

    kafka_bootstrap: KafkaBootstrap
    kafka_tls: Flag = False
    kafka_ca_file: str = ""
    """PEM file of certificates to trust, instead of the system's or those of SSL_CERT_FILE."""
    kafka_cert_file: str = ""
    """PEM file of the client's certificate, for brokers that require one."""
    kafka_key_file: str = ""
    """PEM file of the certificate's key, without a password."""
    kafka_sasl_mechanism: SaslMechanism = "SCRAM-SHA-512"
    kafka_user: str = ""
    kafka_password: str = ""

    def __post_init__(self) -> None:
        require_together(self, "kafka_user", "kafka_password")
        require_together(self, "kafka_cert_file", "kafka_key_file")
        for name in ("ca_file", "cert_file"):
            if getattr(self, f"kafka_{name}") and not self.kafka_tls:
                raise ValueError(f"{PREFIX}KAFKA_{name.upper()} needs {PREFIX}KAFKA_TLS=true")
        self.kafka_client()  # reports an unreadable certificate file at the start

    def kafka_client(self) -> dict[str, Any]:
        """Returns the keyword arguments for an aiokafka client.

        The client reads the certificate files again when they change, because certificates are
        renewed. Raises `SettingsError` if one cannot be read now.
        """
        protocol = "SASL_" if self.kafka_user else ""
        client: dict[str, Any] = {"bootstrap_servers": self.kafka_bootstrap}
        if self.kafka_user:
            client |= {
                "sasl_mechanism": self.kafka_sasl_mechanism,
                "sasl_plain_username": self.kafka_user,
                "sasl_plain_password": self.kafka_password,
            }
        if self.kafka_tls:
            authorities = self.kafka_ca_file or os.environ.get("SSL_CERT_FILE")
            files = authorities, self.kafka_cert_file, self.kafka_key_file
            client["ssl_context"] = RenewedContext(self._ssl_context, partial(stamp, files))
        return client | {"security_protocol": protocol + ("SSL" if self.kafka_tls else "PLAINTEXT")}

    def _ssl_context(self) -> ssl.SSLContext:
        try:
            context = relaxed(ssl.create_default_context(cafile=self.kafka_ca_file or None))
        except OSError as error:  # SSLError is a subclass
            raise SettingsError(
                f"{PREFIX}KAFKA_CA_FILE is wrong: expected certificates in PEM: {error}"
            ) from None
        if self.kafka_cert_file:
            try:
                # Without a password, an encrypted key would ask for one on the terminal.
                context.load_cert_chain(self.kafka_cert_file, self.kafka_key_file, password="")
            except OSError as error:
                raise SettingsError(
                    f"{PREFIX}KAFKA_CERT_FILE or {PREFIX}KAFKA_KEY_FILE is wrong: expected a "
                    f"certificate in PEM and its unencrypted key: {error}"
                ) from None
        return context


def load(kind: type[S], environ: Mapping[str, str]) -> S:
    """Reads the fields of `kind` from the environment, `redis_url` from FLASHSALE_REDIS_URL.

    Raises `SettingsError` with one line that names the variable and the rule. The value is left
    out, because an address may contain a password. A newline at the end is removed, because many
    Secrets have one. Variables that `kind` lacks are ignored, because the processes share one
    environment.
    """
    values = {}
    for field in msgspec.structs.fields(kind):
        variable = PREFIX + field.name.upper()
        if variable in environ:
            values[field.name] = _read(variable, field.type, environ[variable].rstrip("\r\n"))
        elif field.required:
            raise SettingsError(f"{variable} is not set: expected {_rule(field.type)}")
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:  # raised by __post_init__
        raise SettingsError(str(error)) from None


def host_and_port(listen: str) -> tuple[str, int]:
    """Splits a `Listen` value into host and port. Removes the brackets of an IPv6 address."""
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port)


def require_together(settings: msgspec.Struct, *names: str) -> None:
    """Raises `ValueError` if some of these settings are given and others are not."""
    given = [name for name in names if getattr(settings, name)]
    for name in names:
        if given and name not in given:
            raise ValueError(
                f"{PREFIX}{given[0].upper()} is set, but {PREFIX}{name.upper()} is not"
            )


def _read(variable: str, kind: object, value: str) -> str:
    """Returns a value, and an address as its library reads it. Raises `SettingsError`."""
    wrong = f"{variable} is wrong: expected {_rule(kind)}"
    meta = _meta(kind)
    read: Callable[[str], str] | None = ((meta and meta.extra) or {}).get("read")
    try:
        value.encode()  # clients would fail to do it later
        msgspec.convert(value, kind, strict=False)
        return value if read is None else read(value)
    except UnicodeEncodeError:
        raise SettingsError(f"{wrong}, in UTF-8") from None
    except msgspec.ValidationError:
        raise SettingsError(wrong) from None
    except ValueError as error:
        raise SettingsError(f"{wrong}; {error}") from None


def _rule(kind: object) -> str:
    meta = _meta(kind)
    if meta is not None and meta.description:
        return meta.description
    return getattr(kind, "__name__", str(kind))


def _meta(kind: object) -> Meta | None:
    found = (each for each in getattr(kind, "__metadata__", ()) if isinstance(each, Meta))
    return next(found, None)
