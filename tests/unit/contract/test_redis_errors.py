"""Which errors of a call to Redis count as an outage."""

import pytest

from flashsale.errors import RedisUnavailable
from flashsale.redis_errors import translated


async def failing(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset"),
        TimeoutError(),
        RuntimeError("unable to perform operation on <TCPTransport>; the handler is closed"),
    ],
)
async def test_a_lost_connection_is_an_outage(error: Exception) -> None:
    with pytest.raises(RedisUnavailable):
        await translated(failing(error))


async def test_a_mistake_in_the_code_is_no_outage() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        await translated(failing(RuntimeError("no running event loop")))
