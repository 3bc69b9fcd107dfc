"""One reconcile of one FlashSale: reads the live object, makes it so, tells of it."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import asyncpg

from flashsale import ledger
from flashsale.errors import (
    ContractViolation,
    FlashsaleError,
    LedgerUnavailable,
    RedisUnavailable,
)
from flashsale.inventory import Inventory
from flashsale.sale import Sale, SaleSpec, SaleState
from flashsale_operator.kubernetes import events, status
from flashsale_operator.kubernetes.client import Kube, KubeUnavailable
from flashsale_operator.kubernetes.events import Announcement, Known
from flashsale_operator.kubernetes.metrics import Figures, Metrics
from flashsale_operator.kubernetes.rebuilds import Rebuilds
from flashsale_operator.kubernetes.status import Found, Obstacle, Status
from flashsale_operator.sales import manifest
from flashsale_operator.sales.manifest import ManifestError
from flashsale_operator.sales.offsets import KafkaUnavailable
from flashsale_operator.sales.reconciler import Steward, UnknownSale, refuse_eviction

log = logging.getLogger(__name__)

SERVERS: Final[tuple[tuple[type[FlashsaleError], str], ...]] = (
    (RedisUnavailable, "redis"),
    (LedgerUnavailable, "ledger"),
    (KafkaUnavailable, "kafka"),
    (KubeUnavailable, "kubernetes"),
)
CLOSED: Final = Announcement("Closed", "deleted: nothing is accepted any more")


class Key(NamedTuple):
    """A FlashSale's namespace and name."""

    namespace: str
    name: str

    @property
    def sale_id(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Clients:
    """The connections of an operator process, which the composition root makes."""

    kube: Kube
    inventory: Inventory
    pool: "asyncpg.Pool[asyncpg.Record]"
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class Upshot:
    """How a reconcile ended: `gone` there is nothing to come back for; `failed` come back later,
    after longer each time; `changes_ms` when the window will change the state, Unix milliseconds.
    """

    gone: bool = False
    failed: bool = False
    changes_ms: tuple[int, ...] = ()


@dataclass(slots=True)
class _Memory:
    """What is remembered of a FlashSale: what was `known` before its state became Unknown; when
    its status was `written`, of the monotonic clock; whether its keys were missing (`doubted`), and
    whether it was `fenced`, the last time. Without it, a status is written a little early, and what
    changed during an outage is not told.
    """

    uid: str
    known: Known | None = None
    written: float = float("-inf")
    doubted: bool = False
    fenced: bool = False


class Rounds:
    """Reconciles FlashSales. Of one of them, one reconcile at a time."""

    def __init__(
        self,
        clients: Clients,
        rebuilds: Rebuilds,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._kube = clients.kube
        self._inventory = clients.inventory
        self._pool = clients.pool
        self._metrics = clients.metrics
        self._rebuilds = rebuilds
        self._steward = Steward(clients.inventory, clients.pool, rebuilds.rebuild)
        self._clock = clock
        self._memories: dict[Key, _Memory] = {}
        self._prepared = False

    async def reconcile(self, key: Key) -> Upshot:
        """Raises `KubeUnavailable`, and nothing else that a server may cause."""
        live = await self._kube.flash_sale(*key)
        if live is None:
            return await self._gone(key)
        memory = self._memories.get(key)
        if memory is None or memory.uid != live["metadata"]["uid"]:
            # One that was deleted and is applied again at once was never closed.
            memory = self._memories[key] = _Memory(live["metadata"]["uid"])
        return await self._reconcile(key, memory, live)

    async def prepare(self) -> None:
        """Migrates the ledger and looks at Redis' settings, at the start and after an outage:
        another server may have come back.

        Raises `LedgerUnavailable` and `RedisUnavailable`.
        """
        if not self._prepared:
            await ledger.migrate(self._pool)
            await refuse_eviction(self._inventory)
            self._prepared = True

    async def close(self, sale_id: str) -> None:
        """Closes a sale. Raises as `Steward.close`."""
        await self._steward.close(sale_id)

    async def _reconcile(self, key: Key, memory: _Memory, live: dict[str, Any]) -> Upshot:
        spec: SaleSpec | None = None
        try:
            spec = manifest.sale_spec(live)
        except ManifestError as error:
            found = Found(
                SaleState.UNKNOWN,
                False,
                Obstacle.INVALID_SPEC,
                "; ".join(error.mistakes),
                "not known",
            )
        else:
            made = await self._make(spec, memory, live["metadata"])
            if made is None:
                return Upshot(failed=True)
            found = made
        self._metrics.sales.found(
            key,
            Figures(
                item_id="" if spec is None else spec.item_id,
                state=found.state,
                ready=found.ready,
                counts=found.counts,
                recorded=found.recorded,
            ),
        )
        self._count_fences(memory, found.state)
        written = await self._tell(key, memory, live, found)
        failed = isinstance(found.reason, Obstacle) or not written
        bounds = () if spec is None else (spec.starts_ms, spec.ends_ms)
        return Upshot(failed=failed, changes_ms=tuple(ms for ms in bounds if ms is not None))

    async def _make(
        self, spec: SaleSpec, memory: _Memory, metadata: dict[str, Any]
    ) -> Found | None:
        """Makes it so; None to look again before anything is told."""
        try:
            await self.prepare()
            if metadata.get("deletionTimestamp"):
                # Somebody else's finalizer holds it; the sale does not wait for that.
                return status.found_of(await self._steward.close(spec.sale_id))
            report = await self._steward.reconcile(spec, metadata["uid"])
        except (RedisUnavailable, LedgerUnavailable, ContractViolation, UnknownSale) as error:
            self._failed(error)
            return status.found_of_error(error, await self._seen(spec, error))
        if report.state is not SaleState.FENCED:
            report = replace(report, rebuilt=self._rebuilds.forget(spec.sale_id))
            if report.rebuilt is not None:
                self._metrics.lost.inc(report.rebuilt.lost)
            memory.doubted = False
        elif report.sale is None and not memory.doubted:
            # Another operator may have written the row just now and be about to seed.
            memory.doubted = True
            return None
        if report.kept is not None and report.kept.without_kafka:
            self._metrics.failures.labels("kafka").inc()
        return status.found_of(report)

    def _count_fences(self, memory: _Memory, state: SaleState) -> None:
        if state is SaleState.FENCED and not memory.fenced:
            self._metrics.fences.inc()
        elif memory.fenced and state not in (SaleState.FENCED, SaleState.UNKNOWN):
            self._metrics.rebuilds.inc()
        if state is not SaleState.UNKNOWN:
            memory.fenced = state is SaleState.FENCED

    async def _seen(self, spec: SaleSpec, error: FlashsaleError) -> tuple[SaleState, Sale] | None:
        """What Redis does with the sale while the ledger is away: it goes on selling."""
        if not isinstance(error, LedgerUnavailable):
            return None
        try:
            server = await self._inventory.server()
            sale = (await self._inventory.sales([spec.item_id])).get(spec.item_id)
        except (RedisUnavailable, ContractViolation):
            return None
        if sale is None or sale.sale_id != spec.sale_id:
            return None
        return sale.state(server.now_ms, server.run_id), sale

    async def _tell(self, key: Key, memory: _Memory, live: dict[str, Any], found: Found) -> bool:
        """Makes Events and writes the status, if there is news; False if the object has changed
        meanwhile.
        """
        metadata, now = live["metadata"], self._clock()
        before = Status.parse(live.get("status") or {})
        known = Known.of(before)
        if known.state is SaleState.UNKNOWN:
            known = memory.known or known
        else:
            memory.known = known
        for announcement in events.announcements(known, found):
            log.info("%s: %s: %s", key.sale_id, announcement.reason, announcement.message)
            event = events.event(announcement, metadata, known.mark, now)
            await self._kube.create_event(key.namespace, event)
        after = status.next_status(
            before, found, sale_id=key.sale_id, generation=metadata["generation"], now=now
        )
        since = time.monotonic() - memory.written
        if status.worth_writing(before, after, since):
            version = metadata["resourceVersion"]
            if not await self._kube.patch_status(*key, after.json(), version):
                return False
            memory.written = time.monotonic()
        return True

    async def _gone(self, key: Key) -> Upshot:
        """Closes the sale of a FlashSale that is there no more: in the ledger, then in Redis."""
        self._rebuilds.forget(key.sale_id)
        try:
            await self.prepare()
            row = await ledger.sale(self._pool, key.sale_id)
            if row is not None and row.resource_uid is not None:
                await self._steward.close(key.sale_id)
                metadata = {**key._asdict(), "uid": row.resource_uid}
                event = events.event(CLOSED, metadata, "", self._clock())
                await self._kube.create_event(key.namespace, event)
        except (RedisUnavailable, LedgerUnavailable, ContractViolation) as error:
            self._failed(error)
            log.warning("%s is deleted and not closed yet: %s", key.sale_id, error)
            return Upshot(failed=True)
        self._memories.pop(key, None)
        self._metrics.sales.forget(key)
        return Upshot(gone=True)

    def _failed(self, error: FlashsaleError) -> None:
        self._prepared = False
        self._metrics.failures.labels(server_of(error)).inc()


def server_of(error: BaseException) -> str:
    """The server that an error comes from, as the metrics name it."""
    return next((name for kind, name in SERVERS if isinstance(error, kind)), "other")
