"""Helm, and a kube-apiserver of the chart's own: a release would collide with others' CRDs."""

import json
import uuid
from collections.abc import Iterator

import pytest

from dev.cluster.binaries import Binaries, helm
from dev.cluster.control_plane import ControlPlane
from tests.chart import third_party
from tests.chart.chart import Helm, Rendered


@pytest.fixture(scope="session")
def chart(
    request: pytest.FixtureRequest,
    kubernetes: Binaries,  # noqa: ARG001 - without Go there is neither
    tmp_path_factory: pytest.TempPathFactory,
) -> Helm:
    capture = request.config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():  # it takes minutes: its progress is to be seen
        program = helm()
    return Helm(program, tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def plain(chart: Helm) -> Rendered:
    """The chart with nothing but addresses."""
    return chart.render()


@pytest.fixture(scope="session")
def cluster(
    kubernetes: Binaries,  # noqa: ARG001 - built before the minute that a start may take
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ControlPlane]:
    """With the resources of the operators that the chart, k8s and loadtest speak to."""
    crds = third_party.crds()
    with ControlPlane(tmp_path_factory.mktemp("kubernetes")) as plane:
        for path in crds:
            # Server-side: they are too long for the annotation that a client would make.
            plane.kubectl("apply", "--server-side", "-f", str(path), check=True)
        for path in crds:
            plane.kubectl("wait", "--for=condition=Established", "-f", str(path), check=True)
        yield plane


@pytest.fixture
def namespace(cluster: ControlPlane) -> str:
    """One that admits pods of the restricted standard only."""
    name = f"sales-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    made = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": labels},
    }
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(made), check=True)
    return name
