"""Checks that the consumer group in Kafka belongs to the ledger's engine.

Two engines of the same name on one Kafka would share a group, and each would get a part of the
other's events. Each consumer therefore commits its offsets with the id of its engine.
"""

from aiokafka.admin import AIOKafkaAdminClient

from flashsale import events, kafka_clients
from flashsale.errors import OtherEngine


async def check(admin: AIOKafkaAdminClient, engine: str, engine_id: str) -> bool:
    """Returns whether the group names this engine. A group without a name can be claimed.

    `engine` is the engine's name. Raises `OtherEngine` if the group names another engine, and
    `KafkaError`.
    """
    owner = await kafka_clients.group_owner(admin, engine)
    if owner not in (None, engine_id):
        raise OtherEngine(
            f"the consumer group {events.consumer_group(engine)} in Kafka belongs to engine "
            f"{owner}, but this ledger to engine {engine_id}, and both are named {engine}: give "
            "this engine another FLASHSALE_ENGINE and a new database, or delete the group if "
            f"engine {owner} is gone"
        )
    return owner is not None
