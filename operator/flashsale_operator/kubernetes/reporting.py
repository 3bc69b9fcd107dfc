"""Report the results of reconciles: in metrics, in Events and in the status."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flashsale.sale import SaleState
from flashsale_operator.kubernetes import events, status
from flashsale_operator.kubernetes.client import Kube, KubeRefused
from flashsale_operator.kubernetes.events import Known, SaleEvent
from flashsale_operator.kubernetes.metrics import Metrics
from flashsale_operator.kubernetes.queue import Key
from flashsale_operator.kubernetes.rebuilds import Rebuilds
from flashsale_operator.kubernetes.status import Status
from flashsale_operator.sales.decision import Reason
from flashsale_operator.sales.reconciler import Result

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Memory:
    """The memory of a FlashSale between reconciles.

    - `known`: the last known state before the state became Unknown.
    - `written`: when the status was last written, on the monotonic clock.
    - `keys_missing` and `fenced`: whether that was so in the last reconcile.
    - `left_to`: the other engine that an Event has named.
    - `bug`: the unexpected error that was logged last.

    After a restart a status is written a little early, and changes during an outage get no Event.
    """

    uid: str
    known: Known | None = None
    written: float = float("-inf")
    keys_missing: bool = False
    fenced: bool = False
    left_to: str = ""
    bug: str = ""


class Reporter:
    """Reports results for the controller. Methods raise `KubeUnavailable`."""

    def __init__(self, kube: Kube, metrics: Metrics, rebuilds: Rebuilds) -> None:
        self._kube = kube
        self._metrics = metrics
        self._rebuilds = rebuilds

    async def report(self, key: Key, memory: Memory, live: dict[str, Any], result: Result) -> bool:
        """Sets the metrics, creates Events, and writes the status if it has changed.

        Returns False if the object has changed since it was read.
        """
        self._metrics.sales.update(key, result)
        self._count_fences(memory, result.state)
        metadata, now = live["metadata"], datetime.now(UTC)
        before = Status.parse(live.get("status") or {})
        known = Known.of(before)
        if known.state is SaleState.UNKNOWN:
            known = memory.known or known
        else:
            memory.known = known
        for event in events.sale_events(known, result):
            log.info("%s: %s: %s", key.sale_id, event.reason, event.message)
            await self.create_event(key, event, metadata, known.mark)
        if result.rebuilt is not None:
            self._rebuilds.reported(key.sale_id, result.rebuilt)
        after = status.next_status(before, result, generation=metadata["generation"], now=now)
        since = time.monotonic() - memory.written
        if status.worth_writing(before, after, since):
            version = metadata["resourceVersion"]
            if await self._kube.patch_status(*key, after.json(), version) is None:
                return False
            memory.written = time.monotonic()
        return True

    async def create_event(
        self, key: Key, event: SaleEvent, metadata: Mapping[str, Any], mark: str
    ) -> None:
        """Creates an Event, unless the account or a policy does not permit it.

        The status tells the same, and must not wait for it.
        """
        body = events.event_object(event, metadata, mark, datetime.now(UTC))
        try:
            await self._kube.create_event(key.namespace, body)
        except KubeRefused as error:
            log.warning("%s: no Event %s: %s", key.sale_id, event.reason, error)

    def _count_fences(self, memory: Memory, state: SaleState) -> None:
        if state is SaleState.FENCED and not memory.fenced:
            self._metrics.fences.inc()
        elif memory.fenced and state not in (SaleState.FENCED, SaleState.UNKNOWN):
            self._metrics.rebuilds.inc()
        if state is not SaleState.UNKNOWN:
            memory.fenced = state is SaleState.FENCED


def unknown(key: Key, reason: Reason, message: str) -> Result:
    """Returns the result for a sale that the operator cannot read now."""
    return Result(key.sale_id, "", SaleState.UNKNOWN, reason, message)
