"""Close the sales of FlashSales that are deleted, replaced, or another engine's."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from flashsale import ledger
from flashsale.errors import FlashsaleError
from flashsale_operator.kubernetes.client import Kube, declared_version
from flashsale_operator.kubernetes.failures import REPORTED
from flashsale_operator.kubernetes.queue import Key
from flashsale_operator.sales.reconciler import Current, Outdated, Reconciler, Result

log = logging.getLogger(__name__)


class NotClosed(Exception):
    """The sale is not closed yet: look at its FlashSale again."""


class Closing:
    """Closes sales for the controller, which reads the FlashSales."""

    def __init__(
        self,
        kube: Kube,
        pool: ledger.Pool,
        reconciler: Reconciler,
        failed: Callable[[FlashsaleError], None],
    ) -> None:
        """`failed` notes the failure of a server."""
        self._kube = kube
        self._pool = pool
        self._reconciler = reconciler
        self._failed = failed

    def current(self, key: Key, metadata: Mapping[str, Any] | None) -> Current:
        """Returns a call that tells whether a FlashSale is still as it was read.

        `metadata` is None if it was deleted.
        """

        async def unchanged() -> bool:
            live = await self._kube.flash_sale(*key)
            if live is None or metadata is None:
                return live is None and metadata is None
            return declared_version(live["metadata"]) == declared_version(metadata)

        return unchanged

    async def close(
        self, key: Key, metadata: Mapping[str, Any] | None, why: str, *, again: bool = True
    ) -> Result | None:
        """Closes the sale of a name, in the ledger and then in Redis.

        `metadata` is that of the FlashSale which has the name, or None. A sale that the ledger has
        closed is closed `again`, because Redis may not have closed it. Returns None if the name has
        no sale to close. Raises `NotClosed` and `KubeUnavailable`.
        """
        try:
            row = await ledger.sale(self._pool, key.sale_id)
            # A sale without the uid of a FlashSale was applied by flashsalectl.
            if row is None or row.resource_uid is None or (row.closed and not again):
                return None
            return await self._reconciler.close(key.sale_id, self.current(key, metadata))
        except Outdated as error:
            raise NotClosed from error
        except REPORTED as error:
            self._failed(error)
            log.warning("%s: %s, but its sale is not closed yet: %s", key.sale_id, why, error)
            raise NotClosed from error
