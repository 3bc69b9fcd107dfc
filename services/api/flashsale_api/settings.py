"""The API's settings, from FLASHSALE_* environment variables."""

from typing import Annotated, Final

from msgspec import Meta

from flashsale.addresses import HOST, PORT
from flashsale.logs import LogLevel
from flashsale.settings import PREFIX, Flag, KafkaSettings, Listen, RedisUrl, require_together

OrderTokens = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9._~+/-]{32,}=*(,[A-Za-z0-9._~+/-]{32,}=*)?\Z",
        description="one or two tokens with a comma between them, each of at least 32 of the "
        "characters A-Z a-z 0-9 . _ ~ + / -",
    ),
]
HeaderName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,63}\Z",
        description="the name of a header: 1 to 64 of the characters A-Z a-z 0-9 -",
    ),
]
OTHER_HEADERS: Final = (
    "accept accept-encoding accept-language authorization cache-control connection "
    "content-encoding content-length content-type cookie date expect forwarded host http2-settings "
    "idempotency-key if-modified-since if-none-match keep-alive origin proxy-authorization range "
    "referer te traceparent tracestate trailer transfer-encoding upgrade user-agent via "
    "x-forwarded-for x-forwarded-host x-forwarded-port x-forwarded-proto x-real-ip x-request-id"
)
"""Headers that clients and proxies send for other purposes. They name no user."""
WebUrl = Annotated[
    str,
    Meta(
        pattern=rf"^https?://{HOST}(:{PORT})?(/[!-~]*)?\Z",
        description="https://host[:port]/path, or http:// in a trusted network",
    ),
]
Claim = Annotated[
    str,
    Meta(pattern=r"^[!-~]{1,256}\Z", description="1 to 256 printable characters without spaces"),
]


class Settings(KafkaSettings, frozen=True):
    """`listen` is for buyers, `orders_listen` for the shop, and `metrics_listen` for Prometheus.

    Without `order_tokens` the port for the shop is closed. Users are named by `user_header`, or by
    tokens if the three settings of the issuer are set, or otherwise by the body.
    `trust_traceparent` says that a gateway sets the header `traceparent` of buyers.
    """

    redis_url: RedisUrl
    listen: Listen = "[::]:8080"
    orders_listen: Listen = "[::]:8083"
    order_tokens: OrderTokens = ""
    user_header: HeaderName = ""
    jwks_url: WebUrl = ""
    jwt_issuer: Claim = ""
    jwt_audience: Claim = ""
    metrics_listen: Listen = "[::]:9090"
    trust_traceparent: Flag = False
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.user_header.lower() in OTHER_HEADERS.split():
            raise ValueError(
                f"{PREFIX}USER_HEADER is a header that clients or proxies send for another "
                "purpose: name one that only the gateway sets, such as x-user-id"
            )
        require_together(self, "jwks_url", "jwt_issuer", "jwt_audience")
        if self.user_header and self.jwks_url:
            raise ValueError(
                f"{PREFIX}USER_HEADER and {PREFIX}JWKS_URL are set, but only one can name the user"
            )
