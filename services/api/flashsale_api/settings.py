"""The API's settings, from FLASHSALE_* environment variables."""

from flashsale.logs import LogLevel
from flashsale.settings import KafkaSettings, Listen, RedisUrl


class Settings(KafkaSettings, frozen=True):
    """`listen` is for buyers, and `metrics_listen` for Prometheus."""

    redis_url: RedisUrl
    listen: Listen = "0.0.0.0:8080"
    metrics_listen: Listen = "0.0.0.0:9090"
    log_level: LogLevel = "info"
