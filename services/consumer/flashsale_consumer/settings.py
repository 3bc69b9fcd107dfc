"""The consumer's settings, from FLASHSALE_KAFKA_BOOTSTRAP and so on."""

import msgspec

from flashsale.settings import DatabaseUrl, KafkaBootstrap, Listen


class Settings(msgspec.Struct, frozen=True):
    """Where Kafka and the ledger are, and where health and metrics are served."""

    kafka_bootstrap: KafkaBootstrap
    database_url: DatabaseUrl
    listen: Listen = "0.0.0.0:8081"
