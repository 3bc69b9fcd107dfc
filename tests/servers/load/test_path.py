"""`python -m bench.path` measures requests that are accepted or refused, never failed ones."""

import pytest

from bench.path import parts
from dev.stack.servers import RedisServer


async def test_each_measured_request_is_answered(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.path._TRIES", 3)
    assert (await parts(redis_server.url)).accepted > 0
