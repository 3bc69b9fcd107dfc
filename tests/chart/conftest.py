"""Helm and a kube-apiserver for the tests of the chart.

The chart installs the CRD, so its tests cannot share a kube-apiserver with tests that apply it.
"""

import json
import uuid
from collections.abc import Iterator

import pytest

from dev.cluster.binaries import Binaries, helm
from dev.cluster.control_plane import ControlPlane
from tests.support import third_party_crds
from tests.support.chart import Helm, Rendered


@pytest.fixture(scope="session")
def chart(
    request: pytest.FixtureRequest,
    kubernetes: Binaries,  # noqa: ARG001 - skips the test if Go is missing
    tmp_path_factory: pytest.TempPathFactory,
) -> Helm:
    """Build Helm if necessary, which takes minutes and therefore shows its progress."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        program = helm()
    return Helm(program, tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def plain(chart: Helm) -> Rendered:
    """The chart rendered with addresses only."""
    return chart.render()


@pytest.fixture(scope="session")
def cluster(
    kubernetes: Binaries,  # noqa: ARG001 - builds them before the start's timeout begins
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ControlPlane]:
    """A kube-apiserver with every third-party CRD that the chart, k8s and loadtest use."""
    crds = third_party_crds.crds()
    with ControlPlane(tmp_path_factory.mktemp("kubernetes")) as plane:
        for path in crds:
            # A client-side apply fails: the CRDs do not fit into its annotation.
            plane.kubectl("apply", "--server-side", "-f", str(path), check=True)
        for path in crds:
            plane.kubectl("wait", "--for=condition=Established", "-f", str(path), check=True)
        yield plane


@pytest.fixture
def namespace(cluster: ControlPlane) -> str:
    """A new namespace that admits only pods of the restricted Pod Security Standard."""
    name = f"sales-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    manifest = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": labels},
    }
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(manifest), check=True)
    return name
