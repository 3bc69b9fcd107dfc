"""Redis, Kafka and PostgreSQL: real servers as plain processes on loopback."""

from dev.stack.kafka import KafkaServer
from dev.stack.postgres import PostgresServer
from dev.stack.redis import RedisServer
from dev.stack.redis_cluster import RedisCluster

__all__ = ["KafkaServer", "PostgresServer", "RedisCluster", "RedisServer"]
