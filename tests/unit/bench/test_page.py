"""docs/performance.md and its charts have the figures of performance.json."""

import shutil
from pathlib import Path

import msgspec
import pytest

from bench import page
from bench.results import Findings
from tests.support.paths import ROOT

DOCS = ROOT / "docs"


@pytest.fixture
def findings() -> Findings:
    return msgspec.json.decode((DOCS / "performance.json").read_bytes(), type=Findings)


def test_the_page_and_its_charts_have_the_figures_of_the_json_file(
    findings: Findings, tmp_path: Path
) -> None:
    shutil.copy(DOCS / page.PAGE, tmp_path)

    page.write(findings, tmp_path)

    made = sorted(tmp_path.iterdir())
    assert len(made) == 4
    for file in made:
        assert file.read_text() == (DOCS / file.name).read_text(), file.name


def test_a_page_without_a_marker_is_not_written(findings: Findings, tmp_path: Path) -> None:
    lost = (DOCS / page.PAGE).read_text().replace("<!-- figures redis -->\n", "")
    (tmp_path / page.PAGE).write_text(lost)

    with pytest.raises(SystemExit, match="no markers for the figures of redis"):
        page.write(findings, tmp_path)

    assert [file.name for file in tmp_path.iterdir()] == [page.PAGE]
