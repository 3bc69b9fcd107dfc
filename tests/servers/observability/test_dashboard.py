"""The dashboard, on a real Prometheus that scrapes real processes under load."""

import asyncio
import itertools
import json
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from dev.crowd import attempts, stampede
from dev.journal import Attempt
from dev.stack.prometheus import Programs, PrometheusServer
from tests.support.eventually import eventually
from tests.support.observability import ALERTS, RULES, ObservedEngine, documented
from tests.support.paths import CHART_FILES

DASHBOARD = CHART_FILES / "dashboard.json"
WINDOW = "15s"

PANELS: list[dict[str, Any]] = [
    panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"
]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_expressions_use_documented_metrics() -> None:
    known = {metric.name for metric in documented()}
    asked = set(re.findall(r"(?:flashsale|process)_\w+", " ".join(EXPRESSIONS)))
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in asked} <= known


def test_panels_have_descriptions_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    assert all(panel["description"] for panel in PANELS)
    cells = [
        (x, y)
        for panel in PANELS
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


@contextmanager
def a_crowd(engine: ObservedEngine) -> Iterator[None]:
    """Send buyers during the body. Some get a unit, some are rejected, and one pays per wave."""
    done = threading.Event()

    def come() -> None:
        for wave in itertools.count():
            if done.is_set():
                return
            new = [
                Attempt(
                    f"w{wave}-{n}", {"userId": f"w{wave}-{n}", "itemId": engine.item, "quantity": 1}
                )
                for n in range(20)
            ]
            wanted = [*new, *attempts(engine.item, 4, seed=wave)]
            asyncio.run(stampede([engine.api.url], wanted, connections=4))
            engine.order(f"w{wave}-of-an-order")
            done.wait(0.2)

    thread = threading.Thread(target=come)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def values(prometheus: PrometheusServer, engine: ObservedEngine, expression: str) -> list[float]:
    """Return the results of a query that are numbers."""
    for variable, value in (
        ("$__rate_interval", WINDOW),
        ("$__range", "1m"),
        ("$namespace", "shop"),
        ("$item", engine.item),
    ):
        expression = expression.replace(variable, value)
    answer = httpx.get(f"{prometheus.url}/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", (expression, answer)
    found = [float(sample["value"][1]) for sample in answer["data"]["result"]]
    return [value for value in found if not math.isnan(value)]


@pytest.mark.slow
def test_under_load_no_expression_is_empty_and_no_alert_fires(
    prometheus_programs: Programs,  # noqa: ARG001 - skips the test without Prometheus
    engine: ObservedEngine,
    tmp_path: Path,
) -> None:
    engine.world.apply("phone", engine.item, stock=1_000_000)
    server = PrometheusServer(tmp_path / "prometheus", engine.targets, ALERTS)
    with server as prometheus, a_crowd(engine):
        empty = list(EXPRESSIONS)

        def none_is_empty() -> bool:
            empty[:] = [each for each in empty if not values(prometheus, engine, each)]
            return not empty

        eventually(none_is_empty, lambda: str(empty), pause=0.5)
        listed = httpx.get(f"{prometheus.url}/api/v1/rules").json()["data"]["groups"]
        rules = [rule for group in listed for rule in group["rules"]]
        assert {rule["name"] for rule in rules} == set(RULES)
        assert [rule["lastError"] for rule in rules if rule.get("lastError")] == []
        # The machine may be slow while it runs the tests.
        firing = {rule["name"] for rule in rules if rule["state"] == "firing"}
        assert firing <= {"FlashsaleSlow"}


@pytest.mark.slow
def test_an_expression_with_an_unknown_metric_is_empty(
    prometheus_programs: Programs,  # noqa: ARG001 - skips the test without Prometheus
    engine: ObservedEngine,
    tmp_path: Path,
) -> None:
    with PrometheusServer(tmp_path / "prometheus", engine.targets) as prometheus:
        eventually(lambda: values(prometheus, engine, "flashsale_build_info"))
        assert not values(prometheus, engine, "flashsale_no_such_thing")
