"""The kube-apiserver and flashsalectl accept the sample sales."""

from pathlib import Path
from typing import Final

import pytest
import yaml

from dev.cluster.control_plane import ControlPlane
from flashsale_operator.sales import manifest as manifests
from tests.support import paths

pytestmark = pytest.mark.slow

SAMPLES: Final = sorted(paths.SAMPLES.glob("*.yaml"))


def test_the_four_samples_together_show_every_field() -> None:
    specs = [yaml.safe_load(path.read_text())["spec"] for path in SAMPLES]
    assert len(specs) == len({spec["itemId"] for spec in specs}) == 4
    assert {name for spec in specs for name in spec} == {
        "itemId",
        "displayName",
        "stock",
        "maxPerUser",
        "startsAt",
        "endsAt",
        "paused",
        "holdSeconds",
        "maxExpiredHolds",
    }


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_a_sample_passes_strict_validation(plane: ControlPlane, path: Path) -> None:
    (spec,) = manifests.parse(path.read_text())
    assert spec.item_id
    done = plane.kubectl("create", "--dry-run=server", "--validate=strict", "-f", str(path))
    assert (done.returncode, done.stderr) == (0, "")
