"""Settings of the API, from FLASHSALE_* environment variables."""

import msgspec

from flashsale.settings import KafkaBootstrap, Listen, RedisUrl


class Settings(msgspec.Struct, frozen=True):
    """`listen` serves buyers, `metrics_listen` Prometheus only."""

    redis_url: RedisUrl
    kafka_bootstrap: KafkaBootstrap
    listen: Listen = "0.0.0.0:8080"
    metrics_listen: Listen = "0.0.0.0:9090"
