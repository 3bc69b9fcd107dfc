"""Settings from `FLASHSALE_*` environment variables, the same ones for every process."""

from collections.abc import Mapping
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta

from flashsale.errors import SettingsError

PREFIX: Final = "FLASHSALE_"

_PORT: Final = r"(6553[0-5]|655[0-2]\d|65[0-4]\d\d|6[0-4]\d{3}|[1-5]\d{4}|\d{1,4})"

_HOST: Final = r"(\[[0-9a-fA-F:]+\]|[^\s:/@?,\[\]]+)"
_USER: Final = r"([^\s/@]*@)?"

RedisUrl = Annotated[
    str,
    Meta(
        pattern=rf"^rediss?://{_USER}{_HOST}(:{_PORT})?(/\d+)?\Z",
        description="redis://[user:password@]host:port/db, or rediss:// for TLS",
    ),
]
KafkaBootstrap = Annotated[
    str,
    Meta(
        pattern=rf"^[^\s,:]+:{_PORT}(,[^\s,:]+:{_PORT})*\Z",
        description="host:port[,host:port...]",
    ),
]
DatabaseUrl = Annotated[
    str,
    Meta(
        pattern=rf"^postgres(ql)?://{_USER}{_HOST}(:{_PORT})?(,{_HOST}(:{_PORT})?)*(/\S*)?\Z",
        description="postgresql://user:password@host:port/db",
    ),
]
Listen = Annotated[str, Meta(pattern=rf"^{_HOST}:{_PORT}\Z", description="host:port")]

S = TypeVar("S", bound=msgspec.Struct)


def load(kind: type[S], environ: Mapping[str, str]) -> S:
    """Reads the fields of `kind` from the environment: `redis_url` from FLASHSALE_REDIS_URL.

    Raises `SettingsError` with one line that names the variable and the rule, never its value
    (an address may hold a password). Variables that `kind` does not know are left alone: the
    processes share one environment.
    """
    fields = msgspec.structs.fields(kind)
    values = {
        field.name: environ[PREFIX + field.name.upper()]
        for field in fields
        if PREFIX + field.name.upper() in environ
    }
    for field in fields:
        variable = PREFIX + field.name.upper()
        if field.required and field.name not in values:
            raise SettingsError(f"{variable} is not set: expected {_rule(field.type)}")
        if field.name in values:
            try:
                msgspec.convert(values[field.name], field.type, strict=False)
            except msgspec.ValidationError:
                raise SettingsError(f"{variable} is wrong: expected {_rule(field.type)}") from None
    return msgspec.convert(values, kind, strict=False)


def host_and_port(listen: str) -> tuple[str, int]:
    """Splits a `Listen` value; an IPv6 address loses its brackets."""
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port)


def _rule(kind: object) -> str:
    for meta in getattr(kind, "__metadata__", ()):
        if isinstance(meta, Meta) and meta.description:
            return meta.description
    return getattr(kind, "__name__", str(kind))
