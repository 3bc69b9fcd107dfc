"""The operator's settings, read from FLASHSALE_REDIS_URL and similar variables."""

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


class Settings(KafkaSettings, frozen=True):
    """The servers' addresses, the served namespaces, and how long closed sales keep their keys."""

    redis_url: RedisUrl
    database_url: DatabaseUrl
    listen: Listen = "0.0.0.0:8082"
    namespaces: Namespaces = ""
    keep_closed_seconds: Annotated[
        int, Meta(ge=0, le=31_536_000, description="seconds, from 0 to a year")
    ] = 3600
    log_level: LogLevel = "info"

    @property
    def served(self) -> tuple[str, ...]:
        """The served namespaces, sorted. None means all."""
        return tuple(sorted({name for name in self.namespaces.split(",") if name}))
