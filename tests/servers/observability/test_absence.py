"""The alerts on absent components, on a real Prometheus that scrapes real processes."""

from pathlib import Path

import httpx
import pytest

from dev.stack.prometheus import Programs, PrometheusServer
from tests.support.eventually import eventually
from tests.support.observability import COMPONENTS, RULES, ObservedEngine

pytestmark = pytest.mark.slow

ALERTS = {
    "api": "FlashsaleApiAbsent",
    "consumer": "FlashsaleConsumersAbsent",
    "operator": "FlashsaleOperatorAbsent",
}


def found(prometheus: PrometheusServer, expression: str) -> list[object]:
    """Return the result of a query."""
    answer = httpx.get(f"{prometheus.url}/api/v1/query", params={"query": expression})
    return list(answer.raise_for_status().json()["data"]["result"])


def pending(prometheus: PrometheusServer) -> set[str]:
    """Return the alerts whose expression is true now."""
    return {alert for alert in ALERTS.values() if found(prometheus, RULES[alert]["expr"])}


@pytest.mark.parametrize("missing", [None, *COMPONENTS])
def test_the_alert_of_a_missing_component_is_the_only_one(
    missing: str | None,
    prometheus_programs: Programs,  # noqa: ARG001 - skips the test without Prometheus
    engine: ObservedEngine,
    tmp_path: Path,
) -> None:
    targets = {name: url for name, url in engine.targets.items() if name != missing}
    with PrometheusServer(tmp_path / "prometheus", targets) as prometheus:
        eventually(lambda: len(found(prometheus, "flashsale_build_info")) == len(targets))
        assert pending(prometheus) == ({ALERTS[missing]} if missing else set())
