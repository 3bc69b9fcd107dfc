"""The fixtures of these tests, which the fuzz tests share."""

from tests.support.api import (
    api,
    http,
    open_sale,
    own_api,
    own_http,
    own_inventory,
    own_redis,
    proxy,
    without_kafka,
)

__all__ = [
    "api",
    "http",
    "open_sale",
    "own_api",
    "own_http",
    "own_inventory",
    "own_redis",
    "proxy",
    "without_kafka",
]
