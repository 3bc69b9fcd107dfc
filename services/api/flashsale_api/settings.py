"""Settings of the API, from FLASHSALE_* environment variables."""

from flashsale.logs import LogLevel
from flashsale.settings import KafkaSettings, Listen, RedisUrl


class Settings(KafkaSettings, frozen=True):
    """`listen` serves buyers, `metrics_listen` Prometheus only."""

    redis_url: RedisUrl
    listen: Listen = "0.0.0.0:8080"
    metrics_listen: Listen = "0.0.0.0:9090"
    log_level: LogLevel = "info"
