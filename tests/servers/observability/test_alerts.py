"""The alert rules: each fires when it must, stays quiet otherwise, and has a runbook."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from dev.stack.prometheus import Programs
from tests.support.observability import ALERTS, RULES, documented
from tests.support.paths import DOCS, ROOT

RUNBOOKS = DOCS / "runbooks.md"
UNIT_TESTS = Path(__file__).with_name("alerts_test.yaml")


def test_promtool_accepts_the_rules_and_their_unit_tests_pass(
    prometheus_programs: Programs,
) -> None:
    for arguments in (("check", "rules", ALERTS), ("test", "rules", UNIT_TESTS)):
        done = subprocess.run(
            [prometheus_programs.promtool, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    fired: dict[str, set[bool]] = {}
    for test in yaml.safe_load(UNIT_TESTS.read_text())["tests"]:
        for case in test["alert_rule_test"]:
            fired.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    assert fired == {name: {True, False} for name in RULES}


@pytest.mark.parametrize("name", RULES)
def test_an_alert_uses_documented_metrics(name: str) -> None:
    known = {metric.name for metric in documented()}
    used = set(re.findall(r"flashsale_\w+", RULES[name]["expr"]))
    assert used
    assert {re.sub(r"_(bucket|count|sum)$", "", metric) for metric in used} <= known


@pytest.mark.parametrize("name", RULES)
def test_an_alert_links_to_a_runbook_with_a_remedy(name: str) -> None:
    page, _, anchor = RULES[name]["annotations"]["runbook_url"].partition("#")
    assert page == str(RUNBOOKS.relative_to(ROOT))
    assert anchor == name.lower()
    runbook = RUNBOOKS.read_text().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert "Do:" in runbook


def test_the_runbooks_are_those_of_the_alerts() -> None:
    page = RUNBOOKS.read_text()
    assert re.findall(r"^## (Flashsale\w+)$", page, re.MULTILINE) == list(RULES)
    listed = re.findall(r"^\| \[(\w+)\]\(#\w+\) \| (\w+) \|", page, re.MULTILINE)
    assert listed == [(name, rule["labels"]["severity"]) for name, rule in RULES.items()]
