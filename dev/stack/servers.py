"""The three servers: real Redis, Apache Kafka and PostgreSQL as plain processes on loopback."""

from dev.stack.errors import StackError
from dev.stack.kafka import KafkaServer
from dev.stack.packages import redis_binaries
from dev.stack.ports import free_port
from dev.stack.postgres import PostgresServer
from dev.stack.process import Server
from dev.stack.redis import RedisServer

__all__ = [
    "KafkaServer",
    "PostgresServer",
    "RedisServer",
    "Server",
    "StackError",
    "free_port",
    "redis_binaries",
]
