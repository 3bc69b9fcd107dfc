"""A receiver of the topic of recorded reservations, which checks every message."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import asyncpg
import msgspec
from aiokafka import AIOKafkaConsumer, ConsumerRecord
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from flashsale import events
from flashsale.errors import ContractViolation
from flashsale.ledger import Pool
from tests.support import asyncapi

REBUILT: Final = "dev.flashsale.sale.rebuilt.v1"

_LEDGER: Final = """
SELECT sale_id AS "saleId", item_id AS "itemId", reservation_id::text AS "reservationId",
    user_id AS "userId", quantity, r.state, version,
    accepted_at AS "acceptedAt", recorded_at AS "recordedAt", expires_at AS "expiresAt",
    confirmed_at AS "confirmedAt", order_ref AS "orderRef"
FROM reservations r JOIN sales USING (sale_id)
WHERE $1::text IS NULL OR sale_id = $1
"""


@dataclass
class Receiver:
    """An order service's view of the topic: for each reservation, its highest version.

    A recorded version replaces the refused one of the same number.
    """

    reservations: dict[str, dict[str, Any]] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """How often each id was received."""
    rebuilds: list[dict[str, Any]] = field(default_factory=list)
    partitions: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """The partitions in which a key was received."""

    def receive(self, record: ConsumerRecord) -> None:
        """Take one message."""
        event = cloud_event(record)
        data = msgspec.json.decode(record.value)
        rebuilt = event.get_type() == REBUILT
        asyncapi.check("rebuilt" if rebuilt else "reservation", asyncapi.headers_of(record), data)
        key = record.key.decode()
        self.ids[event.get_id()] += 1
        self.partitions[key].add(record.partition)
        if rebuilt:
            self.rebuilds.append(data)
            return
        known = self.reservations.get(key)
        if known is None or _rank(data) >= _rank(known):
            self.reservations[key] = data

    async def agrees(self, pool: Pool) -> bool:
        """Whether this view is exactly the ledger's."""
        return self.reservations == await in_ledger(pool)


def _rank(data: dict[str, Any]) -> tuple[int, bool]:
    return data["version"], data["verdict"] == "recorded"


def cloud_event(record: ConsumerRecord) -> CloudEvent:
    """Read a message with the CloudEvents library, which checks its attributes."""
    headers = dict(record.headers)
    assert len(headers) == len(record.headers), "a header is repeated"
    event = from_binary(KafkaMessage(headers, record.key, record.value), JSONFormat())
    assert isinstance(event, CloudEvent)
    assert event.get_subject() == record.key.decode()
    assert event.get_datacontenttype() == "application/json"
    assert event.get_data() == msgspec.json.decode(record.value)
    return event


async def in_ledger(
    ledger: "Pool | asyncpg.Connection[asyncpg.Record]", sale_id: str | None = None
) -> dict[str, dict[str, Any]]:
    """Return the ledger's reservations as messages, by key: all of them, or those of a sale."""
    found = {}
    for row in await ledger.fetch(_LEDGER, sale_id):
        data = {name: value for name, value in msgspec.to_builtins(dict(row)).items() if value}
        data["verdict"] = "refused" if row["state"] == "refused" else "recorded"
        found[f"{row['saleId']}/{row['reservationId']}"] = data
    return found


async def received(bootstrap: str, engine: str, since: float = 0.0) -> Receiver:
    """Receive the topic to its present end, from its beginning or from a time in Unix seconds."""
    receiver, topic = Receiver(), events.recorded_topic(engine)
    for record in await _read(bootstrap, lambda name: name == topic, since):
        receiver.receive(record)
    return receiver


async def read_all(bootstrap: str, topic: str) -> list[ConsumerRecord]:
    """Read a topic from its beginning to its present end. A missing topic is empty."""
    return await _read(bootstrap, lambda name: name == topic)


async def check_all(bootstrap: str) -> None:
    """Check every message of every engine that shared a Kafka.

    The tests write other records to the topics of events. Only those that the consumer takes for
    events are compared with the description.
    """
    for record in await _read(bootstrap, lambda name: name.endswith(".recorded")):
        Receiver().receive(record)
    for record in await _read(bootstrap, lambda name: name.endswith(".reservations")):
        try:
            event = events.decode(record.value)
        except ContractViolation:
            continue
        headers = asyncapi.headers_of(record)
        if "content-type" in headers:
            asyncapi.check("event", headers, msgspec.json.decode(events.encode(event)))


async def _read(
    bootstrap: str, wanted: Callable[[str], bool], since: float = 0.0
) -> list[ConsumerRecord]:
    async with AIOKafkaConsumer(bootstrap_servers=bootstrap) as anywhere:
        topics = [name for name in await anywhere.topics() if wanted(name)]
    if not topics:
        return []
    found: list[ConsumerRecord] = []
    async with AIOKafkaConsumer(
        *topics, bootstrap_servers=bootstrap, auto_offset_reset="earliest"
    ) as consumer:
        ends = await consumer.end_offsets(sorted(consumer.assignment()))
        if since:
            times = dict.fromkeys(ends, int(since * 1000))
            for tp, first in (await consumer.offsets_for_times(times)).items():
                consumer.seek(tp, first.offset if first else ends[tp])
        while any([await consumer.position(tp) < end for tp, end in ends.items()]):
            for records in (await consumer.getmany(timeout_ms=500)).values():
                found += records
    return found
