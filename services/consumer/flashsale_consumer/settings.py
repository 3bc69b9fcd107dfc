"""The consumer's settings, from FLASHSALE_KAFKA_BOOTSTRAP and so on."""

from flashsale.logs import LogLevel
from flashsale.settings import DatabaseUrl, KafkaSettings, Listen


class Settings(KafkaSettings, frozen=True):
    """Where Kafka and the ledger are, and where health and metrics are served."""

    database_url: DatabaseUrl
    listen: Listen = "0.0.0.0:8081"
    log_level: LogLevel = "info"
