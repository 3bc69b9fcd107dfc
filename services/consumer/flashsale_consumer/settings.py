"""The consumer's settings, read from FLASHSALE_* variables."""

from flashsale.logs import LogLevel
from flashsale.settings import DatabaseUrl, KafkaSettings, Listen


class Settings(KafkaSettings, frozen=True):
    """Addresses of Kafka and the ledger, and the address that serves health and metrics."""

    database_url: DatabaseUrl
    listen: Listen = "[::]:8081"
    log_level: LogLevel = "info"
