"""The sales move to another Redis and back. A stuck rollout of the API sells nothing twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.shop import RELEASE, Object, Shop, commands
from tests.support.manifests import with_stand_ins
from tests.support.paths import CHART

ELSEWHERE = "elsewhere"
WAIT = ("--wait", "--timeout=2m")
STOCK = 200
OPERATOR = (
    "--selector=app.kubernetes.io/component=operator",
    "--sort-by=.metadata.creationTimestamp",
)


def servers() -> Iterator[Object]:
    """Yield the manifests of a Redis whose request fits the node."""
    for name in ("development-secrets", "redis/one-node"):
        yield from with_stand_ins(Path(f"k8s/{name}.yaml"))


@pytest.fixture(scope="module")
def other_redis(shop: Shop) -> Iterator[Shop]:
    """A Redis in another namespace. The Secret `new-redis` of the release has its address."""
    there = Shop(shop.cluster, ELSEWHERE)
    shop.kubectl("create", "namespace", ELSEWHERE)
    for each in servers():
        there.apply(each)
    url = f"redis://:development@redis.{ELSEWHERE}:6379/0"
    shop.kubectl("create", "secret", "generic", "new-redis", f"--from-literal=url={url}")
    there.kubectl("rollout", "status", "statefulset/redis", "--timeout=2m")
    yield there
    shop.kubectl("delete", "secret", "new-redis")
    shop.kubectl("delete", "namespace", ELSEWHERE)


def run(shop: Shop, name: str, secret: str = "new-redis") -> str:
    """Run the commands of a step in docs/operations.md, and return the last output."""
    output = ""
    for command in commands(name, "operations"):
        output = shop.shell(command.replace("new-redis", secret))
    return output


def move(shop: Shop, secret: str) -> None:
    """Move all sales to the Redis of a Secret, as docs/operations.md says."""
    run(shop, "pause every sale")

    def quiet() -> bool:
        try:
            _, *lines = run(shop, "show the outboxes").splitlines()
        except AssertionError:  # a pause that has reached the ledger and not Redis is no agreement
            return False
        return all(" Selling " not in line and line.endswith(" ok") for line in lines)

    shop.until(quiet, "every sale is paused and recorded")
    run(shop, "change the address", secret)

    def adopted() -> bool:
        try:
            return "sales" in run(shop, "adopt the address")
        except AssertionError:  # the pod does not run yet
            return False

    shop.until(adopted, "the address is adopted")
    run(shop, "resume every sale")


def sell(shop: Shop, job: str, rate: int) -> int:
    """Send a crowd and return the number of units that it got."""
    shop.start_load(job, "persistent.js", ITEM_ID="moved", RATE=rate, DURATION="5s", RUN=job)
    return len(shop.end_load(job))


def test_while_the_rollout_of_the_api_is_stuck_nothing_is_sold_at_a_new_redis(
    shop: Shop, other_redis: Shop
) -> None:
    stock = 1_000
    shop.declare("stuck", stock)
    shop.start_buyers("stuck", until="sold-out", RATE=10)
    change = ("--set=redis.existingSecret.name=new-redis", "--set=api.image.tag=9.9.9")
    shop.helm("upgrade", RELEASE, str(CHART), "--reuse-values", *change)

    def refused() -> bool:
        *_, newest = shop.kubectl("get", "pods", *OPERATOR, "--output=name").split()
        return "flashsalectl adopt-redis" in shop.kubectl("logs", newest, check=False)

    shop.until(refused, "the new operator refuses the new address")
    shop.sell_more("stuck")
    shop.start_load("rest", "persistent.js", ITEM_ID="stuck", UNTIL="sold-out", RATE=100)
    promises = shop.end_load("rest") + shop.end_load("stuck")
    assert len(promises) == stock
    assert other_redis.kubectl("exec", "redis-0", "--", "redis-cli", "dbsize").strip() == "0"
    shop.helm("rollback", RELEASE, *WAIT)
    shop.check("stuck", stock, promises)
    shop.until_sale("stuck", "SoldOut")
    shop.agrees()


def test_the_sales_move_to_another_redis_and_back(shop: Shop, other_redis: Shop) -> None:
    shop.declare("moved", STOCK)
    first = sell(shop, "before-moving", 5)
    assert 0 < first < STOCK
    move(shop, "new-redis")
    shop.until_sale("moved", "Selling")
    shop.agrees()
    assert other_redis.kubectl("exec", "redis-0", "--", "redis-cli", "dbsize").strip() != "0"
    rest = STOCK - first
    shop.start_load("moved-on", "stampede.js", ITEM_ID="moved", STOCK=rest, RATE=100, DURATION="4s")
    assert len(shop.end_load("moved-on")) == rest
    shop.until_sale("moved", "SoldOut")
    # The former Redis kept its keys, in which the sale has units left.
    move(shop, "redis")
    shop.agrees()

    def none_left() -> bool:
        # The status is older than the rebuild until the operator has written it again.
        status = shop.get("fs", "moved")["status"]
        return "available" in status and status["available"] == 0

    shop.until(none_left, "the rebuilt sale has no unit left")
    shop.until_sale("moved", "SoldOut")
    assert sum(row[2] for row in shop.ledger("moved")) == STOCK
