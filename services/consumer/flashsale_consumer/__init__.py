"""The consumer: records reservation events from Kafka in the ledger."""
