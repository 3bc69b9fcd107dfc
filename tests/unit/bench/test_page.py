"""docs/performance.md and its charts have the figures of performance.json."""

import shutil
from pathlib import Path

import msgspec
import pytest

from bench import page
from bench.results import Backlog, Backlogs, Findings
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
    assert len(made) == 6
    for file in made:
        assert file.read_text() == (DOCS / file.name).read_text(), file.name


def test_the_page_tells_how_a_backlog_shrank_and_how_long_buyers_waited(
    findings: Findings, tmp_path: Path
) -> None:
    shutil.copy(DOCS / page.PAGE, tmp_path)
    gone = Backlog("Kafka", 5500.0, 20.0, 2.5, 31.0, [25.0, 40.0], [9_000, 4_000], 11_000, 1)
    slow = Backlog("expiry", 5500.0, 20.0, None, 60.0, [25.0, 90.5], [9_000, 7_000], 11_000, 0)

    page.write(
        msgspec.structs.replace(findings, backlogs=Backlogs("at night", [gone, slow])), tmp_path
    )

    text = (tmp_path / page.PAGE).read_text()
    assert "| Kafka | 5,500 | 9,000 | 2.5 | 20.0 | 31.0 | 40.0 | 1 of 11,000 |" in text
    assert "| expiry | 5,500 | 9,000 | 7,000 left | 20.0 | 60.0 | 90.5 | 0 of 11,000 |" in text
    for name in ("performance-backlogs.svg", "performance-backlogs-left.svg"):
        assert name in text
        assert (tmp_path / name).read_text().count("<path") >= 2


def test_a_page_without_a_marker_is_not_written(findings: Findings, tmp_path: Path) -> None:
    lost = (DOCS / page.PAGE).read_text().replace("<!-- figures redis -->\n", "")
    (tmp_path / page.PAGE).write_text(lost)

    with pytest.raises(SystemExit, match="no markers for the figures of redis"):
        page.write(findings, tmp_path)

    assert [file.name for file in tmp_path.iterdir()] == [page.PAGE]
