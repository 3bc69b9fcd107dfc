"""The consumer's settings, from FLASHSALE_* environment variables."""

from typing import Annotated

from msgspec import Meta

from flashsale.logs import LogLevel
from flashsale.requirements import PARTITIONS
from flashsale.settings import DatabaseUrl, KafkaSettings, Listen


class Settings(KafkaSettings, frozen=True):
    """Addresses of Kafka and the ledger, and the address that serves health and metrics."""

    database_url: DatabaseUrl
    kafka_partitions: Annotated[
        int, Meta(ge=1, le=10_000, description="a number from 1 to 10000")
    ] = PARTITIONS
    """Partitions of the topics that the consumer creates."""
    listen: Listen = "[::]:8081"
    log_level: LogLevel = "info"
