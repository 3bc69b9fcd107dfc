"""What the documents say is there, is there."""

import ast
import re

from tests.support.paths import ROOT

RELIABILITY = (ROOT / "docs" / "reliability.md").read_text()


def test_every_test_that_reliability_names_exists() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", RELIABILITY))
    assert len(named) > 10
    for path, test in sorted(named):
        defined = {
            node.name
            for node in ast.walk(ast.parse((ROOT / path).read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert test in defined, f"{path} has no {test}"


def test_every_hole_of_the_reference_has_a_test() -> None:
    table = RELIABILITY.partition("## Faults of the reference")[2]
    rows = [line for line in table.splitlines() if re.match(r"\| (?!fault |-|\|)", line)]
    assert len(rows) == 20
    assert not [row for row in rows if "`tests/" not in row]


def test_every_file_that_reliability_names_exists() -> None:
    for path in set(re.findall(r"`((?:tests|services|docs)/[\w/]+\.\w+)`", RELIABILITY)):
        assert (ROOT / path).is_file(), path
