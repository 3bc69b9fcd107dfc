"""Register the handlers that kopf calls: each event of a FlashSale wakes it in the queue.

Only `on.event` is registered. kopf's other handlers keep their progress in annotations of the
object. Its timers put a finalizer on the object, which would block the deletion of a namespace
together with its operator (docs/adr/0007-status-and-conditions.md).
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import count
from typing import Any, Final

import kopf

from flashsale_operator.kubernetes.client import declared_version
from flashsale_operator.kubernetes.queue import Key, Queue, Urgency
from flashsale_operator.sales.manifest import GROUP, PLURAL, VERSION

LOGIN_SECONDS: Final = 2.0
"""Delay before a login after a refused one."""


def register(
    registry: kopf.OperatorRegistry,
    queue: Queue,
    login: Callable[[], kopf.ConnectionInfo],
    served: Callable[[], Awaitable[None]],
    close: Callable[[], Awaitable[None]],
) -> None:
    """Wakes each FlashSale that exists, is created, changed or deleted.

    `served` waits until the cluster serves FlashSales, because kopf looks for them only once if it
    may not watch the CRD. `close` cancels the tasks that were created since kopf started. Otherwise
    kopf waits for them.
    """
    seen: dict[Key, tuple[object, ...]] = {}
    logins = count()

    @kopf.on.login(registry=registry)
    async def log_in(**_: Any) -> kopf.ConnectionInfo:  # noqa: ANN401 - kopf's keywords
        # kopf asks again after each refused login, and ends if it gets an equal one. But a server
        # can refuse a good token for a while, so each login has a priority of its own.
        if number := next(logins):
            await asyncio.sleep(LOGIN_SECONDS)
        return replace(login(), priority=number)

    @kopf.on.startup(registry=registry, errors=kopf.ErrorsMode.PERMANENT)
    async def wait_for_resource(**_: Any) -> None:  # noqa: ANN401 - kopf's keywords
        await served()

    @kopf.on.cleanup(registry=registry)
    async def clean_up(**_: Any) -> None:  # noqa: ANN401 - kopf's keywords
        await close()

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def flash_sale_changed(
        type: str | None,  # noqa: A002 - kopf's name for it
        meta: kopf.Meta,
        name: str,
        namespace: str | None,
        **_: Any,  # noqa: ANN401 - kopf's keywords
    ) -> None:
        key = Key(namespace or "", name)
        # The objects that kopf lists at the start exist already and have no type.
        urgency = Urgency.DUE if type is None else Urgency.NEW
        if key in seen or type == "DELETED":
            urgency = Urgency.CHANGED
        if type == "DELETED":
            seen.pop(key, None)
        else:
            version = declared_version(meta)
            if seen.get(key) == version:  # only the status has changed: the operator wrote it
                return
            seen[key] = version
        queue.wake(key, urgency)
