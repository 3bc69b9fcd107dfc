"""A shop for the operator's tests: a reconciler on real stores, and the processes around it."""

import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from redis.asyncio import Redis

from flashsale import events, ledger
from flashsale.inventory import Inventory
from flashsale.keys import DEFAULT_ENGINE, ItemKeys
from flashsale.ledger import SaleRow
from flashsale.outbox import Outbox
from flashsale.reservations import (
    FINAL,
    Answer,
    BatchReply,
    Expired,
    OrderCall,
    OutboxEntry,
    Outcome,
    Request,
    State,
    Transition,
    TransitionReply,
)
from flashsale.sale import Sale, SaleSpec, utc_of_ms
from flashsale_operator.sales.decision import StillFenced
from flashsale_operator.sales.drain import Drain, Patience
from flashsale_operator.sales.offsets import Span
from flashsale_operator.sales.rebuild import Rebuilder, Rebuilt
from flashsale_operator.sales.reconciler import Reconciler, Result

_FORMER = "SELECT state, version FROM reservations WHERE sale_id = $1 AND reservation_id = $2"
_WRITE = """
INSERT INTO reservations (sale_id, reservation_id, user_id, quantity, state, version, request_key,
                          accepted_at, expires_at, confirmed_at, order_ref)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
ON CONFLICT (sale_id, reservation_id) DO UPDATE SET
  state = excluded.state, version = excluded.version, expires_at = excluded.expires_at,
  confirmed_at = excluded.confirmed_at, order_ref = excluded.order_ref
"""
_COUNT = """
UPDATE sales SET accepted = accepted + $2, released = released + $3, held = held + $4
WHERE sale_id = $1
"""
QUICK = Patience(seeding=0.05, unseen=0.05, quiet=0.3, recorded=0.3, between=0.01)


@dataclass
class SimulatedShop:
    """A reconciler, with buyers, a publisher and a consumer that need no Kafka.

    `topic` has the spans that Kafka would report.
    """

    redis: "Redis"
    pool: ledger.Pool
    topic: dict[int, Span] = field(default_factory=lambda: {0: Span(0, 0)})
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

    async def rebuild(self, spec: SaleSpec) -> Rebuilt | StillFenced:
        return await self.rebuilder.rebuild(await self.row(spec.sale_id))

    @asynccontextmanager
    async def at_another_redis(self, spec: SaleSpec, url: str) -> AsyncIterator[None]:
        """Rebuild the sale as at another Redis. At the end it gets its present keys back.

        `url` is that of the same Redis, for a user who may copy keys.
        """
        keys = ItemKeys.of(spec.item_id, self.engine).sold
        async with Redis.from_url(url) as client:
            former = {key: value for key in keys if (value := await client.dump(key))}
            await client.delete(*keys)
            assert isinstance(await self.rebuild(spec), Rebuilt)
            yield
            await client.delete(*keys)
            for key, value in former.items():
                await client.restore(key, 0, value)

    async def change_run(self, item_id: str) -> None:
        """Make the sale look as after a restart of Redis, with another run id than the server's."""
        await self.redis.hset(ItemKeys.of(item_id, self.engine).sale, "run_id", "an earlier run")

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

    async def reservation_of(self, item_id: str, user: str) -> str:
        """Return the id of the only reservation of a user."""
        async for _, page in self.inventory.reservation_pages(item_id):
            for reservation_id, record in page:
                if record.user_id == user:
                    return reservation_id
        raise LookupError(user)

    async def confirm(self, item_id: str, user: str, order_ref: str = "order-1") -> Transition:
        call = OrderCall(await self.reservation_of(item_id, user), order_ref)
        return _outcome(await self.inventory.change("confirm", item_id, [call], timeout_seconds=5))

    async def cancel(self, item_id: str, user: str, order_ref: str = "") -> Transition:
        call = OrderCall(await self.reservation_of(item_id, user), order_ref)
        return _outcome(await self.inventory.change("cancel", item_id, [call], timeout_seconds=5))

    async def expire(self, item_id: str, user: str) -> None:
        """Expire the hold of a user as if its time and grace were over."""
        holds = ItemKeys.of(item_id, self.engine).holds
        await self.redis.zadd(holds, {await self.reservation_of(item_id, user): 0})
        reply = await self.inventory.expire(item_id, 1, timeout_seconds=5)
        assert isinstance(reply, Expired)
        assert len(reply.holds) == 1

    async def record(self, item_id: str, *, lose: int = 0) -> None:
        """Move the events of the outbox to the ledger, except the first `lose`."""
        entries = (await self.outbox.page(item_id, until_ms=2**50, count=10_000)).entries
        for number, entry in enumerate(entries):
            if number >= lose:
                await self.write(entry)
        await self.outbox.settle(
            item_id, [(e.entry_id, e.reservation_id, e.record.version) for e in entries]
        )

    async def write(self, entry: OutboxEntry) -> None:
        """Record an event in the ledger, as the consumer does."""
        sale_id, record = entry.snapshot.sale_id, entry.record
        async with self.pool.acquire() as connection, connection.transaction():
            former = await connection.fetchrow(_FORMER, sale_id, entry.reservation_id)
            if former is not None and former["version"] >= record.version:
                return
            was = None if former is None else former["state"]
            await connection.execute(
                _WRITE,
                sale_id,
                entry.reservation_id,
                record.user_id,
                record.quantity,
                record.state,
                record.version,
                record.request_key or None,
                utc_of_ms(record.accepted_ms),
                None if record.expires_ms is None else utc_of_ms(record.expires_ms),
                None if record.confirmed_ms is None else utc_of_ms(record.confirmed_ms),
                record.order_ref or None,
            )
            await connection.execute(
                _COUNT,
                sale_id,
                record.quantity * (was is None),
                record.quantity * (record.state in FINAL and was not in FINAL),
                record.quantity * ((record.state == State.HELD) - (was == State.HELD)),
            )

    async def read_to(self, partition: int, next_offset: int) -> None:
        """Store the offset to which the ledger has read a partition."""
        await self.pool.execute(
            "INSERT INTO kafka_offsets VALUES ($1, $2, $3) "
            "ON CONFLICT (topic, partition) DO UPDATE SET next_offset = $3",
            events.topic(self.engine),
            partition,
            next_offset,
        )


def _outcome(reply: TransitionReply | Transition) -> Transition:
    return reply if isinstance(reply, Transition) else reply.answers[0].outcome


def _one(user: str) -> Request:
    return Request(str(uuid.uuid4()), user, 1)
