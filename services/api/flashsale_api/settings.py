"""The API's settings, from FLASHSALE_* environment variables."""

from typing import Annotated

from msgspec import Meta

from flashsale.logs import LogLevel
from flashsale.settings import KafkaSettings, Listen, RedisUrl

OrderTokens = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9._~+/-]{32,}=*(,[A-Za-z0-9._~+/-]{32,}=*)?\Z",
        description="one or two tokens with a comma between them, each of at least 32 of the "
        "characters A-Z a-z 0-9 . _ ~ + / -",
    ),
]


class Settings(KafkaSettings, frozen=True):
    """`listen` is for buyers, `orders_listen` for the shop, and `metrics_listen` for Prometheus.

    Without `order_tokens` the port for the shop is closed.
    """

    redis_url: RedisUrl
    listen: Listen = "[::]:8080"
    orders_listen: Listen = "[::]:8083"
    order_tokens: OrderTokens = ""
    metrics_listen: Listen = "[::]:9090"
    log_level: LogLevel = "info"
