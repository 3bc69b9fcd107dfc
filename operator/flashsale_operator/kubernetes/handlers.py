"""What kopf calls: translates every event of a FlashSale to "look at it".

Only an `on.event` handler is registered. kopf's others keep their progress in annotations of the
object, and its timers put a finalizer on it, which would hang a namespace that is deleted together
with the operator (docs/adr/0007).
"""

from collections.abc import Awaitable, Callable
from typing import Any

import kopf

from flashsale_operator.kubernetes.controller import Key
from flashsale_operator.sales.manifest import GROUP, PLURAL, VERSION


def register(
    registry: kopf.OperatorRegistry,
    wake: Callable[[Key], None],
    login: Callable[[], kopf.ConnectionInfo],
    close: Callable[[], Awaitable[None]],
) -> None:
    """Has `wake` called for each FlashSale that is there, comes, changes or goes.

    `close` ends the tasks that were made since: kopf would wait for them.
    """
    seen: dict[Key, tuple[object, ...]] = {}

    @kopf.on.login(registry=registry)
    def log_in(**_: Any) -> kopf.ConnectionInfo:  # noqa: ANN401 - kopf's own keywords
        return login()

    @kopf.on.cleanup(registry=registry)
    async def clean_up(**_: Any) -> None:  # noqa: ANN401 - kopf's own keywords
        await close()

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def flash_sale_changed(
        type: str | None,  # noqa: A002 - kopf's name for it
        meta: kopf.Meta,
        name: str,
        namespace: str | None,
        **_: Any,  # noqa: ANN401 - kopf's own keywords
    ) -> None:
        key = Key(namespace or "", name)
        if type == "DELETED":
            seen.pop(key, None)
        else:
            # Not for what the operator wrote itself: a status has no generation.
            mark = (meta.get("uid"), meta.get("generation"), meta.get("deletionTimestamp"))
            if seen.get(key) == mark:
                return
            seen[key] = mark
        wake(key)
