"""Reconcile FlashSales: read the live object, make it so, and have the result reported."""

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from flashsale import ledger, requirements, schema
from flashsale.errors import (
    ContractViolation,
    FlashsaleError,
    LedgerUnavailable,
    RedisMoved,
    RedisUnavailable,
)
from flashsale.inventory import Inventory
from flashsale.requirements import Checks
from flashsale.sale import SaleSpec, SaleState
from flashsale_operator.kubernetes import events
from flashsale_operator.kubernetes.client import Kube, KubeForbidden, KubeUnavailable
from flashsale_operator.kubernetes.closing import Closing, NotClosed
from flashsale_operator.kubernetes.failures import (
    REPORTED,
    RETRIED,
    result_of_bug,
    result_of_error,
    server_of,
)
from flashsale_operator.kubernetes.metrics import Metrics
from flashsale_operator.kubernetes.queue import Key, Queue, Requeue
from flashsale_operator.kubernetes.rebuilds import Rebuilds
from flashsale_operator.kubernetes.reporting import Memory, Reporter, unknown
from flashsale_operator.kubernetes.status import Status
from flashsale_operator.sales import engine, manifest
from flashsale_operator.sales.decision import Reason, spec_of
from flashsale_operator.sales.manifest import ManifestError
from flashsale_operator.sales.reconciler import Outdated, Reconciler, Result

log = logging.getLogger(__name__)

RECONCILES_AT_ONCE: Final = 16


@dataclass(frozen=True, slots=True)
class Clients:
    """The connections of an operator process, which the composition root makes."""

    kube: Kube
    inventory: Inventory
    pool: ledger.Pool
    metrics: Metrics


class Controller:
    """Reconciles the FlashSales of a queue.

    `prefixes` has the prefix of the items that a namespace may sell, by namespace.
    """

    def __init__(
        self,
        clients: Clients,
        queue: Queue,
        rebuilds: Rebuilds,
        *,
        prefixes: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._kube = clients.kube
        self._inventory = clients.inventory
        self._pool = clients.pool
        self._metrics = clients.metrics
        self._queue = queue
        self._rebuilds = rebuilds
        self.reconciler = Reconciler(clients.inventory, clients.pool, rebuilds.rebuild)
        self._closing = Closing(clients.kube, clients.pool, self.reconciler, self._failed)
        self._reporter = Reporter(clients.kube, clients.metrics, rebuilds)
        self._prefixes = prefixes
        self._memories: dict[Key, Memory] = {}
        self._checks = Checks(log)
        self._prepared = False
        self._engine_id: str | None = None
        self.migrating = 0
        """The number of calls that migrate the ledger, or wait for another process to do it."""

    async def run(self) -> None:
        """Reconciles until it is cancelled."""
        async with asyncio.TaskGroup() as workers:
            for _ in range(RECONCILES_AT_ONCE):
                workers.create_task(self._work())

    async def reconcile(self, key: Key) -> Requeue:
        """Reconciles one FlashSale, and reports even an unexpected error in its status.

        Of all servers' errors it raises only `KubeUnavailable`.
        """
        try:
            live = await self._kube.flash_sale(*key)
        except KubeForbidden as error:
            return await self._forbidden(key, error)
        if live is None:
            return await self.close_deleted(key)
        memory = self._memories.get(key)
        if memory is None or memory.uid != live["metadata"]["uid"]:
            # If a FlashSale is deleted and applied again at once, its sale was never closed.
            memory = self._memories[key] = Memory(live["metadata"]["uid"])
        try:
            requeue = await self._reconcile(key, memory, live)
        except NotClosed:
            return Requeue(failed=True)
        except KubeUnavailable:
            raise
        except Exception as error:
            if Status.parse(live.get("status") or {}).engine not in (None, self._engine_id):
                raise  # another engine's FlashSale
            self._metrics.failures.labels("other").inc()
            result = result_of_bug(key.sale_id, error)
            if memory.bug != result.message:
                log.exception("%s: the reconcile failed", key.sale_id)
            memory.bug = result.message
            await self._reporter.report(key, memory, live, result)
            return Requeue(failed=True)
        memory.bug = ""
        return requeue

    async def prepare(self) -> None:
        """Migrates the ledger and checks the servers, at the start and after each outage.

        A different server may have come back. Raises `UnmetRequirement`, `LedgerUnavailable`,
        `RedisUnavailable`, `OtherEngine` and `RedisMoved`.
        """
        if not self._prepared:
            self._checks.require(requirements.LEDGER, await schema.facts(self._pool))
            await self._migrate()
            self._engine_id = await ledger.engine_id(self._pool, self._inventory.engine)
            await engine.require_redis(self._checks, self._inventory)
            await engine.claimed_id(self._inventory, self._pool)
            self._prepared = True

    async def _migrate(self) -> None:
        known = self._engine_id is not None
        self.migrating += 1
        try:
            await schema.migrate(self._pool, self._inventory.engine, known=known)
        finally:
            self.migrating -= 1

    async def stop_all_outdated(self) -> None:
        """Stops the sales of a Redis that the sales have left, where they are behind the ledger.

        Raises nothing, because only the move matters to a person.
        """
        try:
            await self.reconciler.stop_all_outdated(self._engine_id or "")
        except REPORTED as error:
            log.warning("the sales in the former Redis are not all fenced yet: %s", error)

    async def _work(self) -> None:
        while True:
            key = await self._queue.take()
            began = time.monotonic()
            requeue = Requeue(failed=True)
            try:
                requeue = await self.reconcile(key)
            except KubeUnavailable as error:
                self._metrics.failures.labels(server_of(error)).inc()
                log.warning("%s: %s", key.sale_id, error)
            except Exception:
                # Even the report failed. The error must not stop the other FlashSales.
                self._metrics.failures.labels("other").inc()
                log.exception("%s: the reconcile failed", key.sale_id)
            self._metrics.reconciles.inc()
            self._metrics.reconcile_seconds.observe(time.monotonic() - began)
            self._queue.give_back(key, requeue)

    async def _reconcile(self, key: Key, memory: Memory, live: dict[str, Any]) -> Requeue:
        bounds: tuple[int | None, ...] = ()
        unprepared: FlashsaleError | None = None
        try:
            await self.prepare()
        except REPORTED as error:
            self._failed(error)
            unprepared = error
        own, owner = await self._own_id(), Status.parse(live.get("status") or {}).engine
        if owner is not None and owner != own:
            return await self._leave(key, memory, live["metadata"], owner, own)
        if owner is None and own is not None and unprepared is None:
            # Before any other write: of two engines, the kube-apiserver lets one have it.
            version = live["metadata"]["resourceVersion"]
            claimed = await self._kube.patch_status(*key, {"engine": own}, version)
            if claimed is None:
                return Requeue(failed=True)
            live = claimed
            if Status.parse(live.get("status") or {}).engine is None:
                unprepared = ContractViolation(
                    "the CustomResourceDefinition has no status.engine: install the one of this "
                    "version"
                )
        result: Result | None
        if unprepared is None and live["metadata"].get("deletionTimestamp"):
            # Another party's finalizer keeps the FlashSale. Its spec does not matter any more.
            without = "the FlashSale was deleted, and it has no sale"
            result = await self._closing.close(key, live["metadata"], "deleted") or Result(
                key.sale_id, "", SaleState.CLOSING, Reason.CLOSED, without
            )
        else:
            spec, mistakes = await self._wanted(key, live, unprepared)
            if spec is None:
                result = unknown(key, Reason.INVALID_SPEC, mistakes)
            else:
                bounds = (spec.starts_ms, spec.ends_ms)
                result = (
                    await self._make(key, spec, memory, live, mistakes)
                    if unprepared is None
                    else await self._failed_result(spec, unprepared)
                )
        if result is None:
            return Requeue(again=True)
        written = await self._reporter.report(key, memory, live, result)
        return Requeue(
            failed=result.reason in RETRIED or not written,
            changes_ms=tuple(ms for ms in bounds if ms is not None),
        )

    async def _wanted(
        self, key: Key, live: dict[str, Any], unprepared: FlashsaleError | None
    ) -> tuple[SaleSpec | None, str]:
        """Returns the spec to carry out, and the mistakes of the manifest.

        With mistakes, the sale keeps its former spec, if it has one. The sale of an earlier
        FlashSale of that name is closed.
        """
        try:
            spec = manifest.sale_spec(live)
            manifest.check_item(spec, self._prefixes)
        except ManifestError as error:
            mistakes = "; ".join(error.mistakes)
        else:
            return spec, ""
        if isinstance(unprepared, LedgerUnavailable):
            return None, mistakes
        try:
            row = await ledger.sale(self._pool, key.sale_id)
        except LedgerUnavailable as error:
            self._failed(error)
            return None, mistakes
        if row is None or row.closed or row.resource_uid is None:
            return None, mistakes
        if row.resource_uid == live["metadata"]["uid"]:
            return spec_of(row), mistakes
        if unprepared is None:
            with suppress(NotClosed):  # `INVALID_SPEC` is retried
                await self._closing.close(key, live["metadata"], "replaced")
        return None, mistakes

    async def _forbidden(self, key: Key, error: KubeForbidden) -> Requeue:
        """Shows that a sale is unknown until a person gives the right back, or closes the sale.

        A Role ends with its namespace, so the operator may never learn that the FlashSale is gone.
        """
        with suppress(LedgerUnavailable):
            row = await ledger.sale(self._pool, key.sale_id)
            if row is None or row.closed:
                self._memories.pop(key, None)
                self._metrics.sales.forget(key)
                return Requeue(gone=True)
        self._metrics.sales.update(key, unknown(key, Reason.FAILED, str(error)))
        raise error

    async def _own_id(self) -> str | None:
        """Returns the id of this operator's engine, or None if no server has told it yet."""
        if self._engine_id is not None:
            return self._engine_id
        try:
            return await self._inventory.index.engine_id() or None
        except RedisUnavailable:
            return None

    async def _leave(
        self, key: Key, memory: Memory, metadata: dict[str, Any], owner: str, own: str | None
    ) -> Requeue:
        """Leaves a FlashSale to the engine that its status names.

        This engine may have served an earlier FlashSale of that name, and still sell for it. That
        sale is closed. Raises `NotClosed`.
        """
        if own is None:
            log.warning("%s: the operator does not know its engine yet", key.sale_id)
            return Requeue(failed=True)
        self._rebuilds.forget(key.sale_id)
        self._metrics.sales.forget(key)
        await self._closing.close(key, metadata, f"left to engine {owner}", again=False)
        if memory.left_to != owner:
            event = events.other_engine(owner, own)
            log.warning("%s: %s", key.sale_id, event.message)
            await self._reporter.create_event(key, event, metadata, f"{owner} {own}")
            memory.left_to = owner
        return Requeue()

    async def _make(
        self, key: Key, spec: SaleSpec, memory: Memory, live: dict[str, Any], mistakes: str
    ) -> Result | None:
        """Makes the ledger and Redis match the spec. None means: look again before a report.

        With `mistakes` of the manifest, `spec` is the former one.
        """
        metadata, before = live["metadata"], Status.parse(live.get("status") or {})
        current = self._closing.current(key, metadata)
        try:
            result = await self.reconciler.reconcile(
                spec,
                metadata["uid"],
                current,
                served=before.counts is not None,
                mistakes=mistakes,
            )
            sale = result.own_sale
            # Open holds of an earlier spec also expire, so sale.hold_ms does not matter.
            if sale and sale.released and not before.hold_expired:
                expired = await self.reconciler.hold_expired(spec.sale_id)
                result = replace(result, hold_expired=expired)
        except Outdated:
            return None
        except REPORTED as error:
            self._failed(error)
            return await self._failed_result(spec, error)
        if result.state is not SaleState.FENCED:
            result = replace(result, rebuilt=self._rebuilds.outcome(spec.sale_id))
            memory.keys_missing = False
        elif result.sale is None and not memory.keys_missing:
            # Another process may have inserted the row just now and be about to seed the keys.
            memory.keys_missing = True
            return None
        if result.reason is Reason.KAFKA_UNAVAILABLE:
            self._metrics.failures.labels("kafka").inc()
        return result

    async def _failed_result(self, spec: SaleSpec, error: FlashsaleError) -> Result:
        """Returns the result of a reconcile that an error ended.

        If only the ledger is away, Redis still sells, and the result has Redis' counts. In a Redis
        that the sales have left, an outdated sale is fenced sooner than by the next resync.
        """
        result = result_of_error(spec, error)
        if isinstance(error, RedisMoved):
            try:
                await self.reconciler.stop_outdated(spec.sale_id, self._engine_id or "")
            except REPORTED as another:
                return result_of_error(spec, another)
        if not isinstance(error, LedgerUnavailable):
            return result
        try:
            sale, server = await self._inventory.observe(spec.item_id)
        except (RedisUnavailable, ContractViolation):
            return result
        if sale is None or sale.sale_id != spec.sale_id:
            return result
        return replace(result, state=sale.state(server.now_ms, server.run_id), sale=sale)

    async def close_deleted(self, key: Key) -> Requeue:
        """Closes the sale of a deleted FlashSale.

        Of all servers' errors it raises only `KubeUnavailable`.
        """
        self._rebuilds.forget(key.sale_id)
        try:
            if not self._prepared:
                await self._migrate()  # Redis may be away
            result = await self._closing.close(key, None, "deleted")
        except NotClosed:
            return Requeue(failed=True)
        except REPORTED as error:
            self._failed(error)
            log.warning("%s: deleted, but its sale is not closed yet: %s", key.sale_id, error)
            return Requeue(failed=True)
        if result is not None and result.row is not None:
            metadata = {**key._asdict(), "uid": result.row.resource_uid}
            await self._reporter.create_event(key, events.CLOSED, metadata, "")
        self._memories.pop(key, None)
        self._metrics.sales.forget(key)
        return Requeue(gone=True)

    def _failed(self, error: FlashsaleError) -> None:
        self._prepared = False
        self._metrics.failures.labels(server_of(error)).inc()
