"""A worker whose writes meet connections that have just closed, as uvloop reports them."""

from asyncio import StreamWriter

import pytest
from aiokafka.protocol.commit import OffsetFetchRequest_v1
from aiokafka.protocol.fetch import FetchRequest_v1
from aiokafka.protocol.offset import OffsetRequest_v1

from tests.support.consumer import Log, accepted, running
from tests.support.eventually import until
from tests.support.ledgers import Ledger

_API_KEY = slice(4, 6)
"""Where a request has the number of its kind, behind its size."""


@pytest.mark.parametrize(
    "kind", [FetchRequest_v1.API_KEY, OffsetRequest_v1.API_KEY, OffsetFetchRequest_v1.API_KEY]
)
async def test_a_worker_goes_on_after_a_write_to_a_connection_that_has_just_closed(
    kind: int, ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each client of the worker meets one. In the turn after a reset, aiokafka still writes."""
    failures = 0
    write = StreamWriter.write

    def fail(writer: StreamWriter, data: bytes) -> None:
        nonlocal failures
        if failures < 3 and data[_API_KEY] == kind.to_bytes(2, "big"):
            failures += 1
            writer.transport.abort()
            raise RuntimeError(f"unable to perform operation on {writer}; the handler is closed")
        write(writer, data)

    first, second = accepted(), accepted()
    async with running(ledger.url, log):
        await log.write(first)
        await ledger.until_has(first)
        monkeypatch.setattr(StreamWriter, "write", fail)
        await until(lambda: failures == 3, "the writes fail")
        await log.write(second)
        await ledger.until_has(second)
