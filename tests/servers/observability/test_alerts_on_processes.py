"""Alerts on components that are missing or stuck: a real Prometheus scrapes real processes."""

import asyncio
from pathlib import Path

import httpx
import pytest

from dev.stack.prometheus import Programs, PrometheusServer
from tests.support.eventually import eventually, until
from tests.support.ledgers import connected
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


async def test_confirmations_that_no_consumer_records_are_an_alert(
    prometheus_programs: Programs,  # noqa: ARG001 - skips the test without Prometheus
    engine: ObservedEngine,
    tmp_path: Path,
) -> None:
    """The units of a sold-out sale are all recorded, and few events wait. No other alert tells."""
    stuck = RULES["FlashsaleConsumersStuck"]["expr"]
    others = [RULES[f"Flashsale{name}"]["expr"] for name in ("AcceptedNotRecorded", "ConsumersLag")]
    engine.world.apply("phone", engine.item, stock=100)
    engine.world.until("phone", state="Selling")
    path = engine.reserve("user-who-pays-later")
    with PrometheusServer(tmp_path / "prometheus", engine.targets) as prometheus:
        await until(lambda: found(prometheus, "flashsale_consumer_lag"))
        await until(lambda: not found(prometheus, stuck))
        async with connected(engine.world.addresses.database_url) as ledger:
            async with ledger.transaction():
                # This stops only the consumers.
                await ledger.execute("LOCK TABLE kafka_offsets IN EXCLUSIVE MODE")
                await asyncio.to_thread(engine.confirm, path, "order-1")
                await until(lambda: found(prometheus, stuck))
                assert not any(found(prometheus, expression) for expression in others)
            await until(lambda: not found(prometheus, stuck))
