"""Two engines, each with its own Redis and ledger, whose operators serve the same namespace."""

import json
import urllib.error
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dev.services import OperatorServer
from dev.stack.servers import PostgresServer, RedisServer
from tests.support.cluster import World
from tests.support.eventually import eventually
from tests.support.servers import database

pytestmark = pytest.mark.slow


@pytest.fixture
def second(world: World, postgres_server: PostgresServer, tmp_path: Path) -> Iterator[World]:
    """Another engine for the same namespace."""
    with database(postgres_server) as url, RedisServer(tmp_path / "second-redis") as redis:
        other = replace(
            world,
            redis=redis,
            addresses=replace(world.addresses, redis_url=redis.url, database_url=url),
            folder=tmp_path / "second-processes",
            services=[],
        )
        yield other
        other.end()


def engine(world: World) -> str:
    return str(world.on_ledger("SELECT id FROM engine"))


def sells(world: World, item: str) -> bool:
    return world.sale(item).get("state") == "open"


def until_left(world: World, name: str) -> None:
    """Wait until one operator has left the FlashSale to the other's engine."""
    eventually(lambda: "OtherEngine" in world.events(name))


def readiness(operator: OperatorServer) -> tuple[int, str]:
    """Return the status code and the text of /readyz."""
    try:
        return 200, operator.get("/readyz")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_of_two_engines_exactly_one_sells_a_flashsale(world: World, second: World) -> None:
    names = [f"cup-{number}" for number in range(20)]
    operators = [world.operator(), second.operator()]
    listed = [world.manifest(name, stock=50) for name in names]
    world.kubectl(
        "apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": listed})
    )
    engines = {engine(each): each for each in (world, second)}
    for name in names:
        live = world.until(name, state="Selling", ready="Applied")
        winner = engines[live["status"]["engine"]]
        loser = second if winner is world else world
        until_left(world, name)
        assert sells(winner, name)
        assert loser.sale(name) == {}
        assert loser.on_ledger("SELECT count(*) FROM sales WHERE item_id = $1", name) == 0
        assert world.events(name).count("OtherEngine") == 1
        assert world.events(name).count("Opened") == 1
    # Both stay ready: each can serve the FlashSales of its own engine.
    eventually(lambda: [readiness(each) for each in operators] == [(200, "ready\n")] * 2)


def test_a_flashsale_that_is_deleted_and_applied_again_moves_to_the_other_engine(
    world: World, second: World
) -> None:
    first = world.operator()
    world.apply("cup")
    world.until("cup", state="Selling", ready="Applied")
    later = second.operator()
    until_left(world, "cup")
    assert second.sale("cup") == {}
    first.kill()
    world.delete("cup")
    world.apply("cup")
    live = world.until("cup", state="Selling", ready="Applied")
    assert live["status"]["engine"] == engine(second)
    assert sells(second, "cup")
    assert readiness(later) == (200, "ready\n")

    # The former operator missed all that. It closes its own sale and touches nothing else.
    first.start()
    eventually(lambda: world.sale("cup")["state"] == "closed")
    assert world.on_ledger("SELECT closed FROM sales WHERE item_id = 'cup'")
    assert sells(second, "cup")
    assert world.get("cup")["status"]["engine"] == engine(second)
    assert world.condition("cup", "Open")["reason"] == "Selling"


def test_a_flashsale_of_the_previous_version_gets_its_engine(world: World) -> None:
    operator = world.operator()
    world.apply("cup")
    world.until("cup", state="Selling", ready="Applied")
    operator.kill()
    patch = ("patch", "fs", "cup", "--subresource=status", "--type=merge", "-p")
    world.kubectl(*patch, json.dumps({"status": {"engine": None}}))
    assert "engine" not in world.get("cup")["status"]
    operator.start()
    eventually(lambda: world.get("cup")["status"].get("engine") == engine(world))
    assert world.events("cup") == ["Opened"]


def test_an_operator_at_another_redis_is_not_ready_and_seeds_nothing(
    world: World, second: World
) -> None:
    world.operator()
    world.apply("cup")
    world.until("cup", state="Selling", ready="Applied")
    operator = second.operator(FLASHSALE_DATABASE_URL=world.addresses.database_url)
    eventually(lambda: "the sales are in the Redis at" in readiness(operator)[1])
    assert readiness(operator)[0] == 503
    assert readiness(operator)[1].count("\n") == 1
    assert second.sale("cup") == {}
    assert sells(world, "cup")
