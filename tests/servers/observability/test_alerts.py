"""The alerts: each fires when it must, is quiet when it must be, and says what to do."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dev.stack.prometheus import Programs
from tests.servers.observability.documented import documented
from tests.support.paths import ROOT

ALERTS = ROOT / "charts" / "flashsale" / "files" / "alerts.yaml"
UNIT_TESTS = Path(__file__).with_name("alerts_test.yaml")
RULES: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for group in yaml.safe_load(ALERTS.read_text())["groups"]
    for rule in group["rules"]
}


def test_promtool_finds_nothing_wrong_and_its_unit_tests_pass(
    prometheus_programs: Programs,
) -> None:
    for arguments in (("check", "rules", ALERTS), ("test", "rules", UNIT_TESTS)):
        done = subprocess.run(
            [prometheus_programs.promtool, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_test_that_fires_and_one_that_does_not() -> None:
    fired: dict[str, set[bool]] = {}
    for test in yaml.safe_load(UNIT_TESTS.read_text())["tests"]:
        for case in test["alert_rule_test"]:
            fired.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    assert fired == {name: {True, False} for name in RULES}


@pytest.mark.parametrize("name", RULES)
def test_an_alert_asks_for_metrics_that_there_are(name: str) -> None:
    known = {metric.name for metric in documented()}
    asked = set(re.findall(r"flashsale_\w+", RULES[name]["expr"]))
    assert asked
    assert {re.sub(r"_(bucket|count|sum)$", "", metric) for metric in asked} <= known


@pytest.mark.parametrize("name", RULES)
def test_an_alert_has_its_runbook(name: str) -> None:
    page, _, anchor = RULES[name]["annotations"]["runbook_url"].partition("#")
    alerts = (ROOT / page).read_text().partition("\n## Alerts\n")[2]
    headings = re.findall(r"^### (\w+)$", alerts, re.MULTILINE)
    assert anchor == name.lower()
    assert name in headings
    runbook = alerts.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
    assert "Do:" in runbook


def test_there_is_no_runbook_without_an_alert() -> None:
    alerts = (ROOT / "docs" / "operations.md").read_text().partition("\n## Alerts\n")[2]
    headings = re.findall(r"^### (\w+)$", alerts.partition("\n## ")[0], re.MULTILINE)
    assert headings == list(RULES)
