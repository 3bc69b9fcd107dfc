"""A release of an older commit is upgraded in the middle of a sale, in the order of the documents.

The older release has neither holds nor the topic of recorded reservations.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.e2e.shop import COMPONENTS, WAIT, Shop
from tests.support.paths import CHART, ROOT

FORMER: Final = "26664e549f57e0ba6d1498f4bb6312caabf4bcce"
"""The commit of the older release."""
NAME: Final = "former"
PLENTY: Final = 1_000_000


@pytest.fixture(scope="module")
def former(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """A release of the older chart with the older images, and with servers of its own."""
    sources = tmp_path_factory.mktemp("former")
    extract(sources)
    build = (sys.executable, "-m", "dev.images", "build")
    built = subprocess.run(build, cwd=sources, stdout=subprocess.PIPE, text=True, check=True)
    references = [line.split()[0] for line in built.stdout.splitlines()]
    shop.cluster.load({each: f"{each.rpartition(':')[0]}:{NAME}" for each in references})
    release = Shop(shop.cluster, NAME, NAME)
    release.create_namespace()
    release.start_servers()
    values = (
        f"--values={sources / 'tests/e2e/values.yaml'}",
        "--set=kafka.bootstrap=kafka.shop:9092",
        "--set=crds.enabled=false",
        *(f"--set={component}.image.tag={NAME}" for component in COMPONENTS),
    )
    release.helm("install", NAME, str(sources / "charts/flashsale"), *values, *WAIT)
    yield release
    release.helm("uninstall", NAME, *WAIT)
    shop.kubectl("delete", "namespace", NAME)


def extract(folder: Path) -> None:
    """Write the files of the older commit to a folder."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("the older release needs a clone of the repository, and git")
    archive = subprocess.run((git, "archive", FORMER), cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"the older release needs the whole history, with the commit {FORMER[:7]}")
    subprocess.run(("tar", "--extract"), input=archive.stdout, cwd=folder, check=True)


def test_an_older_release_is_upgraded_in_the_middle_of_a_sale(former: Shop) -> None:
    former.declare("kept", PLENTY)
    former.start_buyers("kept", RATE=20)
    for component in ("consumer", "api", "operator"):
        latest = (f"--set={component}.image.tag=", "--reset-then-reuse-values")
        former.helm("upgrade", NAME, str(CHART), *latest, *WAIT)
    former.until(lambda: NAME not in former.images(), "all pods have the new image")
    former.check("kept", PLENTY, former.end_buyers("kept"))
    former.agrees()
