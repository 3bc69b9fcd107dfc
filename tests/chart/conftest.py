"""Helm and a kube-apiserver for the tests of the chart.

The chart installs the CRD, so its tests cannot share a kube-apiserver with tests that apply it.
"""

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev.cluster.binaries import Binaries, helm, helm_if_built
from dev.cluster.control_plane import ControlPlane
from tests.support import third_party_crds
from tests.support.chart import Helm, Rendered


@pytest.fixture(scope="session")
def chart(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """The chart and a Helm. With --quick only a Helm that is there already is used."""
    if request.config.getoption("quick"):
        program = helm_if_built() or shutil.which("helm")
        if program is None:
            pytest.skip("the chart needs Helm: install it, or build it once with `make test-all`")
    else:
        request.getfixturevalue("kubernetes")
        program = helm()
    return Helm(Path(program), tmp_path_factory.mktemp("helm"))


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
