"""Ending a client within a bounded time, whatever state its server is in."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final

log = logging.getLogger(__name__)

CLOSE_SECONDS: Final = 3.0


async def close(client: str, closing: Coroutine[Any, Any, object]) -> None:
    """Waits for it, but for 3 seconds at most; it then goes on while the process lives."""
    task = asyncio.create_task(closing)
    done, _ = await asyncio.wait([task], timeout=CLOSE_SECONDS)
    if not done:
        log.warning("%s: not closed within %.0f s", client, CLOSE_SECONDS)
    elif task.cancelled():
        # From within: aiokafka's stop() does so while a fetch waits for its retry (its issue 647).
        log.warning("%s: not closed cleanly: it was cancelled", client)
    elif error := task.exception():
        log.warning("%s: not closed cleanly: %s", client, error)
