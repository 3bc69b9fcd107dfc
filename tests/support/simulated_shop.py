"""A shop for the operator's tests: a reconciler on real stores, and the processes around it."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from redis.asyncio import Redis

from flashsale import events, ledger
from flashsale.inventory import Inventory
from flashsale.keys import DEFAULT_ENGINE
from flashsale.ledger import SaleRow
from flashsale.outbox import Outbox
from flashsale.reservations import Answer, BatchReply, Outcome, Request
from flashsale.sale import Sale, SaleSpec
from flashsale_operator.sales.drain import Drain, Patience
from flashsale_operator.sales.offsets import Span
from flashsale_operator.sales.rebuild import Rebuilder
from flashsale_operator.sales.reconciler import Reconciler, Result

QUICK = Patience(seeding=0.05, unseen=0.05, quiet=0.3, recorded=0.3, between=0.01)


@dataclass
class SimulatedShop:
    """A reconciler, with buyers, a publisher and a consumer that need no Kafka.

    `topic` has the spans that Kafka would report.
    """

    redis: "Redis"
    pool: ledger.Pool
    topic: dict[int, Span] = field(default_factory=dict)
    patience: Patience = QUICK
    engine: str = DEFAULT_ENGINE

    def __post_init__(self) -> None:
        self.inventory = Inventory(self.redis, self.engine)
        self.outbox = Outbox(self.redis, self.engine)
        self.drain = Drain(self.inventory, self.pool, self.spans, patience=self.patience)
        self.rebuilder = Rebuilder(self.inventory, self.pool, self.drain)
        self.reconciler = Reconciler(self.inventory, self.pool, self.rebuilder.rebuild)

    async def spans(self) -> Mapping[int, Span]:
        return dict(self.topic)

    async def apply(self, spec: SaleSpec) -> Result:
        return await self.reconciler.reconcile(spec)

    async def sale(self, item_id: str) -> Sale | None:
        return (await self.inventory.sales([item_id])).get(item_id)

    async def row(self, sale_id: str) -> SaleRow:
        row = await ledger.sale(self.pool, sale_id)
        assert row is not None
        return row

    async def buy(self, item_id: str, *users: str) -> list[Outcome]:
        """Reserve one unit per user, in one call."""
        return [answer.outcome for answer in await self.send(item_id, [_one(u) for u in users])]

    async def send(self, item_id: str, requests: Sequence[Request]) -> list[Answer]:
        reply = await self.inventory.reserve(item_id, requests, timeout_seconds=5)
        if isinstance(reply, BatchReply):
            return list(reply.answers)
        return [Answer(reply)] * len(requests)

    async def record(self, item_id: str, *, lose: int = 0) -> None:
        """Move the events of the outbox to the ledger, except the first `lose`."""
        entries = await self.outbox.page(item_id, until_ms=2**50, count=10_000)
        for number, entry in enumerate(entries):
            sale_id, record = entry.snapshot.sale_id, entry.record
            if number < lose:
                continue
            async with self.pool.acquire() as connection, connection.transaction():
                await connection.execute(
                    "INSERT INTO reservations (sale_id, reservation_id, user_id, quantity, state, "
                    "version, occurred_at) VALUES ($1, $2, $3, $4, 'accepted', 1, now())",
                    sale_id,
                    entry.reservation_id,
                    record.user_id,
                    record.quantity,
                )
                await connection.execute(
                    "UPDATE sales SET accepted = accepted + $2 WHERE sale_id = $1",
                    sale_id,
                    record.quantity,
                )
        await self.outbox.settle(item_id, [(e.entry_id, e.reservation_id) for e in entries])

    async def read_to(self, partition: int, next_offset: int) -> None:
        """Store the offset to which the ledger has read a partition."""
        await self.pool.execute(
            "INSERT INTO kafka_offsets VALUES ($1, $2, $3) "
            "ON CONFLICT (topic, partition) DO UPDATE SET next_offset = $3",
            events.topic(self.engine),
            partition,
            next_offset,
        )


def _one(user: str) -> Request:
    return Request(str(uuid.uuid4()), user, 1)
