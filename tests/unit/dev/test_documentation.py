"""The documents: their links resolve, and they agree with the code, the Makefile and the tests."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import msgspec
import pytest
import yaml

from flashsale.sale import SaleState
from flashsale.settings import PREFIX
from flashsale_api.responses import Problem
from flashsale_api.settings import Settings as ApiSettings
from flashsale_consumer.settings import Settings as ConsumerSettings
from flashsale_operator.sales.decision import Reason
from flashsale_operator.settings import Settings as OperatorSettings
from tests.support.paths import CRD, DOCS, ROOT

README: Final = ROOT / "README.md"
RELIABILITY: Final = (DOCS / "reliability.md").read_text()
TAKING_PAYMENT: Final = (DOCS / "taking-payment.md").read_text()

_FENCE: Final = re.compile(r"^( *```).*?^\1", re.DOTALL | re.MULTILINE)
_CODE_SPAN: Final = re.compile(r"`[^`\n]*`")
_LINK: Final = re.compile(r"\]\(([^)\s]+)\)")
_PATH: Final = re.compile(
    r"(?<![\w./-])(?:\.ci|\.github|bench|charts|dev|docs|examples|k8s|loadtest|operator|services|src"
    r"|tests)/[\w./-]*\w"
)
_HEADING: Final = re.compile(r"^#+ +(.*)$", re.MULTILINE)


def pages() -> list[Path]:
    """Every Markdown file that git knows or that is new."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted({ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()})


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", page.read_text())):
        text = re.sub(r"\]\([^)]*\)", "", heading).lower()
        slug = base = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
        number = 0
        while slug in found:
            number += 1
            slug = f"{base}-{number}"
        found.add(slug)
    return frozenset(found)


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The file and the anchor of each relative link of a page."""
    for target in _LINK.findall(_CODE_SPAN.sub("", _FENCE.sub("", page.read_text()))):
        if not re.match(r"[a-z]+:", target):
            name, _, anchor = target.partition("#")
            yield (page.parent / name).resolve() if name else page, anchor


def commands(page: Path) -> Iterator[str]:
    """The code blocks and code spans of a page."""
    text = page.read_text()
    yield from (match[0] for match in _FENCE.finditer(text))
    yield from _CODE_SPAN.findall(_FENCE.sub("", text))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_resolves(page: Path) -> None:
    broken = [
        f"{target.name}#{anchor}"
        for target, anchor in links(page)
        if not target.exists() or (anchor and anchor not in anchors(target))
    ]
    assert broken == []


def test_every_page_is_one_click_from_the_readme() -> None:
    """Except the appendix of other pages, and the single decision records behind their list."""
    linked = {target for target, _ in links(README)}
    apart = {DOCS / "history.md"}
    assert [page.name for page in DOCS.glob("*.md") if page not in linked | apart] == []
    assert {DOCS / "adr" / "README.md", ROOT / "CONTRIBUTING.md"} <= linked


def test_the_readme_has_at_most_120_lines() -> None:
    assert len(README.read_text().splitlines()) <= 120


def test_every_documented_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in pages():
        for text in commands(page):
            named = set(re.findall(r"^`?make ([a-z][a-z0-9-]*)", text, re.MULTILINE))
            assert named <= targets, f"{page.name}: {named - targets}"


def test_every_documented_watch_is_of_one_kind() -> None:
    """Because kubectl refuses to watch several."""
    for page in pages():
        watches = re.findall(r"kubectl get ([^`\n]*?) --watch", "\n".join(commands(page)))
        assert not [kinds for kinds in watches if "," in kinds], page.name


def test_the_install_page_lists_exactly_the_settings_of_the_processes() -> None:
    settings = {
        PREFIX + field.name.upper()
        for kind in (ApiSettings, ConsumerSettings, OperatorSettings)
        for field in msgspec.structs.fields(kind)
    }
    rows = re.findall(r"^\| `(FLASHSALE_\w+)`", (DOCS / "install.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(settings)


def test_the_http_page_lists_exactly_the_problems_of_the_api() -> None:
    rows = re.findall(r"^\| (\d+) \| `([a-z-]+)`", (DOCS / "http-api.md").read_text(), re.MULTILINE)
    problems = [(str(problem.value.status), problem.value.slug) for problem in Problem]
    assert sorted(rows) == sorted(problems)


def test_the_flashsale_page_lists_exactly_the_fields_states_and_reasons() -> None:
    page = (DOCS / "flashsale-resource.md").read_text()
    schema = yaml.safe_load(CRD.read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    assert set(table(page, "Spec")) == set(schema["properties"]["spec"]["properties"])
    assert set(table(page, "States")) == {state.value for state in SaleState}
    ready = {Reason.APPLIED, Reason.CLOSED}
    obstacles = {reason.value for reason in Reason if reason not in ready}
    assert set(table(page, "Conditions")) == obstacles | {"Ready", "Open", "SoldOut", "Refused"}


def table(page: str, section: str) -> list[str]:
    """The code spans in the first column of a section's tables."""
    text = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def test_every_test_that_the_reliability_page_names_exists() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", RELIABILITY + TAKING_PAYMENT))
    assert len(named) > 10
    for path, test in sorted(named):
        defined = {
            node.name
            for node in ast.walk(ast.parse((ROOT / path).read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert test in defined, f"{path} has no {test}"


def test_every_combination_of_two_releases_has_a_test() -> None:
    combinations = RELIABILITY.partition("## Two releases")[2].partition("### Tenants")[0]
    rows = [line for line in combinations.splitlines() if re.match(r"\| (?!shared |-|\|)", line)]
    parts = {re.split(r"[ ,]", row)[1] for row in rows}
    assert parts == {"Kafka", "Redis", "ledger", "namespaces"}
    assert not [row for row in rows if not re.search(r"`tests/[\w/]+\.py::\w+` \|$", row)]


def test_every_fault_of_the_reference_has_a_test() -> None:
    faults = RELIABILITY.partition("## Faults of the reference")[2]
    rows = [line for line in faults.splitlines() if re.match(r"\| (?!fault |-|\|)", line)]
    assert len(rows) == 20
    assert not [row for row in rows if "`tests/" not in row]


def test_every_failure_of_another_shop_has_a_test() -> None:
    failures = TAKING_PAYMENT.partition("## Failures of other shops")[2]
    rows = [line for line in failures.splitlines() if line.startswith("| [")]
    assert len(rows) == 12
    assert not [row for row in rows if "`tests/" not in row]


def test_every_path_that_a_page_names_exists() -> None:
    for page in pages():
        for path in _PATH.findall(page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
