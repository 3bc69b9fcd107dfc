"""A cluster of the tests' own, with the images of this tree, the servers and the release."""

import sys
from collections.abc import Iterator

import pytest

from dev.cluster.images import load_all
from dev.cluster.node import OF_TESTS, Cluster
from dev.images.building import variant
from tests.e2e.shop import CHANGED, Shop, commands


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Apart from that of `make cluster`; it ends with the tests."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    own = Cluster(OF_TESTS)
    own.down()  # of tests that were killed
    with capture.global_and_fixture_disabled():  # minutes, the first time: to be seen
        own.up()
    yield own
    with capture.global_and_fixture_disabled():
        own.down()


@pytest.fixture(scope="session")
def shop(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[Shop]:
    """Installed as docs/install.md says, in a namespace that admits restricted pods only."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        own = load_all(cluster)
        others = [variant(image.reference, CHANGED) for image in own]
        cluster.load({other: other for other in others})
    found = Shop(cluster)
    for command in commands("install"):
        found.shell(command)
    yield found
    if request.session.testsfailed:
        _keep_what_there_was(found)


def _keep_what_there_was(shop: Shop) -> None:
    """For who looks into a failure once the cluster is gone."""
    log = shop.cluster.state / "log" / "shop.log"
    said = [
        shop.kubectl("get", "all,fs,events", "--output=wide", check=False),
        shop.kubectl("describe", "pods", check=False),
    ]
    for pod in shop.get("pods")["items"]:
        name = pod["metadata"]["name"]
        said += [
            f"== {name} {which}\n" + shop.kubectl("logs", name, which, check=False)
            for which in ("--previous=false", "--previous")
        ]
    log.write_text("\n".join(said))
    sys.stderr.write(f"\nwhat there was in the cluster: {log}\n")
