"""The dashboard, on a real Prometheus that reads real processes under load."""

import asyncio
import itertools
import json
import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from dev.crowd import attempts, stampede
from dev.journal import Attempt
from dev.stack.prometheus import Programs, PrometheusServer
from tests.servers.observability.conftest import Shop
from tests.servers.observability.documented import documented
from tests.servers.observability.test_alerts import ALERTS, RULES
from tests.support.paths import ROOT

DASHBOARD = ROOT / "charts" / "flashsale" / "files" / "dashboard.json"
DEADLINE_SECONDS = 90.0
WINDOW = "15s"

PANELS: list[dict[str, Any]] = [
    panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"
]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_an_expression_asks_for_metrics_that_there_are() -> None:
    known = {metric.name for metric in documented()}
    asked = set(re.findall(r"(?:flashsale|process)_\w+", " ".join(EXPRESSIONS)))
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in asked} <= known


def test_panels_say_what_they_show_and_do_not_overlap() -> None:
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
def a_crowd(shop: Shop) -> Iterator[None]:
    """Buyers who come until the body is done: some get a unit, some are turned away."""
    done = threading.Event()

    def come() -> None:
        for wave in itertools.count():
            if done.is_set():
                return
            new = [
                Attempt(
                    f"w{wave}-{n}", {"userId": f"w{wave}-{n}", "itemId": shop.item, "quantity": 1}
                )
                for n in range(20)
            ]
            wanted = [*new, *attempts(shop.item, 4, seed=wave)]
            asyncio.run(stampede([shop.api.url], wanted, connections=4))
            done.wait(0.2)

    thread = threading.Thread(target=come)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def values(prometheus: PrometheusServer, shop: Shop, expression: str) -> list[float]:
    """What Prometheus finds, but for what is not a number."""
    for variable, value in (
        *(("$__rate_interval", WINDOW), ("$__range", "1m")),
        *(("$namespace", "shop"), ("$item", shop.item)),
    ):
        expression = expression.replace(variable, value)
    answer = httpx.get(f"{prometheus.url}/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", (expression, answer)
    found = [float(sample["value"][1]) for sample in answer["data"]["result"]]
    return [value for value in found if not math.isnan(value)]


@pytest.mark.slow
def test_no_expression_is_empty_and_no_alert_fires_under_load(
    prometheus_programs: Programs,  # noqa: ARG001 - says what is missing where it is
    shop: Shop,
    tmp_path: Path,
) -> None:
    shop.world.apply("phone", shop.item, stock=1_000_000)
    server = PrometheusServer(tmp_path / "prometheus", shop.targets, ALERTS)
    with server as prometheus, a_crowd(shop):
        empty = EXPRESSIONS
        deadline = time.monotonic() + DEADLINE_SECONDS
        while empty and time.monotonic() < deadline:
            time.sleep(0.5)
            empty = [each for each in empty if not values(prometheus, shop, each)]
        assert not empty
        listed = httpx.get(f"{prometheus.url}/api/v1/rules").json()["data"]["groups"]
        rules = [rule for group in listed for rule in group["rules"]]
        assert {rule["name"] for rule in rules} == set(RULES)
        assert [rule["lastError"] for rule in rules if rule.get("lastError")] == []
        # How fast this machine is while it runs the tests, is no matter of theirs.
        firing = {rule["name"] for rule in rules if rule["state"] == "firing"}
        assert firing <= {"FlashsaleSlow"}


@pytest.mark.slow
def test_a_metric_that_nobody_exposes_is_found_empty(
    prometheus_programs: Programs,  # noqa: ARG001 - says what is missing where it is
    shop: Shop,
    tmp_path: Path,
) -> None:
    with PrometheusServer(tmp_path / "prometheus", shop.targets) as prometheus:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not values(prometheus, shop, "flashsale_build_info"):
            assert time.monotonic() < deadline
        assert not values(prometheus, shop, "flashsale_no_such_thing")
