"""A cluster for these tests, with this tree's images, the servers and the release."""

import sys
from collections.abc import Iterator

import pytest

from dev.cluster.images import load_all
from dev.cluster.node import OF_TESTS, Cluster
from dev.images.building import variant
from dev.paths import LOCAL
from tests.e2e.shop import CHANGED, Shop, commands


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster next to the one of `make cluster`. It is removed after the tests."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    own = Cluster(OF_TESTS)
    own.down()  # removes the remains of tests that were killed
    with capture.global_and_fixture_disabled():  # shows the progress of a build that takes minutes
        own.up()
    yield own
    with capture.global_and_fixture_disabled():
        own.down()


@pytest.fixture(scope="session")
def shop(request: pytest.FixtureRequest, cluster: Cluster) -> Shop:
    """The release, installed with the commands in docs/install.md."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        own = load_all(cluster)
        others = [variant(image.reference, CHANGED) for image in own]
        cluster.load({other: other for other in others})
    found = Shop(cluster)
    try:
        for command in commands("install"):
            found.shell(command)
    except AssertionError:
        _keep_state(found)
        raise
    return found


def pytest_exception_interact(node: pytest.Item) -> None:
    """Keep the state of the cluster at the moment of a failure."""
    found = getattr(node, "funcargs", {}).values()
    if shops := [each for each in found if isinstance(each, Shop)]:
        _keep_state(shops[0])


def _keep_state(shop: Shop) -> None:
    """Write the cluster's state and logs to a file that outlives the cluster."""
    log = LOCAL / "e2e.log"
    everywhere = "--all-namespaces"
    parts = [
        shop.kubectl("get", "all,fs,events", everywhere, "--output=wide", check=False),
        shop.kubectl("describe", "fs,pods", everywhere, check=False),
    ]
    for pod in shop.get("pods", everywhere)["items"]:
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        parts += [
            f"== {namespace}/{name} {which}\n"
            + shop.kubectl("logs", name, f"--namespace={namespace}", which, check=False)
            for which in ("--previous=false", "--previous")
        ]
    log.write_text("\n".join(parts))
    sys.stderr.write(f"\nthe state of the cluster is in {log}\n")
