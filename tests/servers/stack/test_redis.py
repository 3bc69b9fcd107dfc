"""Redis' binaries and settings."""

from pathlib import Path

import pytest
from redis.asyncio import Redis

from dev.stack.errors import StackError
from dev.stack.packages import redis_binaries
from dev.stack.servers import RedisServer


@pytest.mark.parametrize("name", redis_binaries())
async def test_every_available_server_binary_works(name: str, tmp_path: Path) -> None:
    with RedisServer(tmp_path, binary=redis_binaries()[name]) as server:
        async with Redis.from_url(server.url) as client:
            wanted = {
                "maxmemory-policy": "noeviction",
                "repl-backlog-ttl": "0",
                "appendonly": "yes",
                "appendfsync": "everysec",
            }
            assert await client.config_get(*wanted) == wanted
            modules = {module[b"name"] for module in await client.module_list()}
            assert b"graph" not in modules, "FalkorDB's module was loaded"


async def test_the_settings_of_the_caller_apply(tmp_path: Path) -> None:
    with RedisServer(tmp_path, appendfsync="always", options=("--maxmemory", "64mb")) as server:
        async with Redis.from_url(server.url) as client:
            settings = await client.config_get("appendfsync", "maxmemory")
            assert settings == {"appendfsync": "always", "maxmemory": str(64 << 20)}


def test_the_environment_variable_selects_the_binary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHSALE_REDIS_SERVER", str(tmp_path / "absent"))
    with pytest.raises(StackError, match=r"cannot run .*absent"):
        RedisServer(tmp_path).start()
