"""The operator's settings, from FLASHSALE_* environment variables."""

from typing import Annotated

from msgspec import Meta

from flashsale.logs import LogLevel
from flashsale.settings import DatabaseUrl, KafkaSettings, Listen, RedisUrl

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
Namespaces = Annotated[
    str,
    Meta(
        pattern=rf"^({_LABEL}(,{_LABEL})*)?\Z",
        description="namespaces separated by commas, or nothing for all",
    ),
]

_PREFIX = r"[A-Za-z0-9][A-Za-z0-9._~-]{0,63}"
Items = Annotated[
    str,
    Meta(
        pattern=rf"^({_LABEL}={_PREFIX}(,{_LABEL}={_PREFIX})*)?\Z",
        description="NAMESPACE=PREFIX[,NAMESPACE=PREFIX...], or nothing for no rule. A prefix is 1 "
        "to 64 of the characters A-Z a-z 0-9 . _ ~ - and begins with a letter or a digit",
    ),
]


class Settings(KafkaSettings, frozen=True):
    """The servers' addresses, and the operator's choices for namespaces, items and keys."""

    redis_url: RedisUrl
    database_url: DatabaseUrl
    listen: Listen = "[::]:8082"
    namespaces: Namespaces = ""
    items: Items = ""
    keep_closed_seconds: Annotated[
        int, Meta(ge=0, le=31_536_000, description="seconds, from 0 to a year")
    ] = 3600
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs = [pair for pair in self.items.split(",") if pair]
        if len(pairs) > len(self.prefixes):
            raise ValueError("FLASHSALE_ITEMS is wrong: a namespace appears twice")

    @property
    def prefixes(self) -> dict[str, str]:
        """The prefix of the items that a namespace may sell, by namespace."""
        return dict(pair.split("=") for pair in self.items.split(",") if pair)

    @property
    def served(self) -> tuple[str, ...]:
        """The served namespaces, sorted. If there are none, all are served."""
        return tuple(sorted({name for name in self.namespaces.split(",") if name}))
