"""A FlashSale resource that is installed after the operator, or deleted while the operator runs."""

import json
import os
import signal
import urllib.error
from collections.abc import Iterator

import pytest

from dev.cluster.control_plane import ControlPlane
from dev.services import OperatorServer
from tests.support.chart import CRD_RESOURCE
from tests.support.cluster import World
from tests.support.eventually import eventually
from tests.support.paths import CRD

pytestmark = pytest.mark.slow

MISSING = "the cluster has no FlashSale resource: install the chart's CRD (crds.enabled)"


def install(plane: ControlPlane) -> None:
    plane.kubectl("apply", "-f", str(CRD), check=True)
    plane.kubectl("wait", "--for=condition=Established", CRD_RESOURCE, check=True)


def delete(plane: ControlPlane) -> None:
    plane.kubectl("delete", CRD_RESOURCE, "--timeout=30s", check=True)


@pytest.fixture(autouse=True)
def restored(plane: ControlPlane) -> Iterator[None]:
    """Install the resource again for the other tests of this kube-apiserver."""
    yield
    install(plane)


def unready(operator: OperatorServer) -> str:
    """Return the reason why the operator is not ready, or nothing."""
    try:
        operator.get("/readyz")
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode().strip()
    return ""


def errors(operator: OperatorServer) -> list[str]:
    """Return the messages at the level `error`. Fails if a line of the log is no record."""
    records = [json.loads(line) for line in operator.log.read_text().splitlines()]
    assert not [record for record in records if "exception" in record]
    return [record["message"] for record in records if record["level"] == "ERROR"]


def watches(plane: ControlPlane) -> int:
    """Return the number of open watches of FlashSales."""
    metrics = plane.kubectl("get", "--raw", "/metrics", check=True).stdout
    return sum(
        int(float(line.split()[-1]))
        for line in metrics.splitlines()
        if line.startswith("apiserver_longrunning_requests{")
        and 'resource="flashsales"' in line
        and 'verb="WATCH"' in line
    )


def test_an_operator_that_starts_before_the_resource_waits_and_then_watches(world: World) -> None:
    delete(world.plane)
    operator = world.operator()
    eventually(lambda: unready(operator) == MISSING, lambda: unready(operator))
    assert operator.get("/healthz") == "alive\n"
    assert errors(operator) == [f"resync failed: {MISSING}"]
    assert watches(world.plane) == 0
    install(world.plane)
    eventually(lambda: unready(operator) == "", lambda: unready(operator))
    eventually(lambda: watches(world.plane) == 1)
    world.apply("late")
    world.until("late", state="Selling", ready="Applied")


def test_an_operator_that_waits_for_the_resource_stops_at_a_signal(world: World) -> None:
    delete(world.plane)
    operator = world.operator()
    eventually(lambda: unready(operator) == MISSING, lambda: unready(operator))
    assert operator.pid is not None
    os.kill(operator.pid, signal.SIGTERM)
    eventually(lambda: operator.pid is None)
    assert errors(operator) == [f"resync failed: {MISSING}"]


def test_an_operator_whose_resource_is_deleted_ends_with_one_line(
    world: World, operator: OperatorServer
) -> None:
    eventually(lambda: watches(world.plane) == 1)
    delete(world.plane)
    eventually(lambda: operator.pid is None)
    *_, last = errors(operator)
    assert last.startswith("the operator ends, because the FlashSale resource was deleted: install")
    operator.start()
    eventually(lambda: unready(operator) == MISSING, lambda: unready(operator))
