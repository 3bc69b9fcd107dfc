"""`flashsalectl report`: the figures of the ledger, as text, JSON and HTML."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from redis import Redis

from dev.stack.servers import RedisServer
from flashsale import __version__
from flashsale.sale import SaleSpec
from flashsale_operator.ctl.report import FIRST_SECONDS, MAX_BARS
from flashsale_operator.sales import offsets
from tests.support.ctl import NOWHERE, Ctl, Within
from tests.support.simulated_shop import SimulatedShop

OPENED = datetime(2026, 11, 27, 9, 0, tzinfo=UTC)
NAME = "<script>alert('x')</script> & \"co\""


@pytest.fixture
def reported(ctl: Ctl) -> Callable[[str], dict[str, Any]]:
    """Return a function that reports the only sale of an item."""

    def call(item: str) -> dict[str, Any]:
        code, lines, _ = ctl("report", item, "-o", "json")
        assert code == 0
        [found] = json.loads("\n".join(lines))
        return dict(found)

    return call


@pytest.fixture
def topic(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Kafka without records, so that an audit needs no server."""

    async def spans(_: object) -> dict[int, offsets.Span]:
        return {}

    monkeypatch.setattr(offsets, "spans", spans)


async def reserve(
    shop: SimulatedShop, spec: SaleSpec, *seconds: float, state: str = "confirmed"
) -> None:
    """Apply a sale, and record a reservation at each time after it opened, 100 ms later."""
    await shop.apply(spec)
    await shop.pool.execute(
        "INSERT INTO reservations (sale_id, reservation_id, user_id, quantity, state, version, "
        "accepted_at, confirmed_at, recorded_at) SELECT $1, gen_random_uuid(), 'user' || n, 1, $2, "
        "1, time, CASE WHEN $2 = 'confirmed' THEN time END, time + interval '100 ms' "
        "FROM unnest($3::timestamptz[]) WITH ORDINALITY AS times (time, n)",
        spec.sale_id,
        state,
        [OPENED + timedelta(seconds=each) for each in seconds],
    )


@pytest.mark.usefixtures("topic")
def test_the_units_and_the_buyers_of_each_state_add_up(
    within: Within, reported: Callable[[str], dict[str, Any]], spec: SaleSpec
) -> None:
    async def sell(shop: SimulatedShop) -> None:
        await shop.apply(replace(spec, hold_seconds=600))
        await shop.buy(spec.item_id, "ann", "bob", "cat", "dan")
        await shop.confirm(spec.item_id, "bob")
        await shop.expire(spec.item_id, "cat")
        await shop.cancel(spec.item_id, "dan")
        await shop.record(spec.item_id)

    within(sell)
    found = reported(spec.item_id)
    once = {"reservations": 1, "units": 1}
    assert found["counts"] == {
        "confirmed": once,
        "held": once,
        "expired": once,
        "cancelled": once,
        "refused": {"reservations": 0, "units": 0},
    }
    assert (found["stock"], found["lost"]) == (10, 0)
    assert (found["buyers"], found["users"]) == (2, 4)
    assert (found["allReservedSeconds"], found["allConfirmedSeconds"]) == (None, None)
    # The others were changed, which overwrites the time of their row.
    assert found["toRow"]["rows"] == 1
    assert (found["audit"]["verdict"], found["audit"]["notes"]) == ("ok", [])
    assert found["versions"]["flashsale"] == __version__
    assert found["versions"].keys() == {"flashsale", "redis", "postgresql", "ledger"}


def test_the_times_and_rates_are_those_of_the_reservations(
    within: Within, reported: Callable[[str], dict[str, Any]], spec: SaleSpec
) -> None:
    starts_ms = int(OPENED.timestamp() * 1000)
    small = replace(spec, stock=3, starts_ms=starts_ms)
    within(lambda shop: reserve(shop, small, 0.25, 0.5, 2, 61, 185))
    found = reported(spec.item_id)
    assert found["openedAt"] == found["startsAt"] == "2026-11-27T09:00:00.000Z"
    assert found["firstReservedAt"] == "2026-11-27T09:00:00.250Z"
    assert (found["allReservedSeconds"], found["allConfirmedSeconds"]) == (2.0, 2.0)
    assert found["rate"] == {
        "beginsAt": "2026-11-27T09:00:00.000Z",
        "firstMinute": [2, 0, 1, *[0] * 57],
        "laterBeginsAt": "2026-11-27T09:01:00.000Z",
        "barSeconds": 60,
        "later": [1, 0, 1],
    }
    assert found["toRow"] == {
        "rows": 5,
        "p50Ms": 100.0,
        "p95Ms": 100.0,
        "p99Ms": 100.0,
        "maxMs": 100.0,
    }


def test_a_restock_during_the_audit_is_reported_with_its_reservations(
    within: Within,
    reported: Callable[[str], dict[str, Any]],
    spec: SaleSpec,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = replace(spec, stock=1)
    within(lambda shop: reserve(shop, small, 1))

    async def restock(_: object) -> dict[int, offsets.Span]:
        connection = await asyncpg.connect(database_url)
        await connection.execute("UPDATE sales SET allocated = 2, capacity = 2")
        await connection.close()
        return {}

    monkeypatch.setattr(offsets, "spans", restock)
    found = reported(spec.item_id)
    assert (found["stock"], found["allReservedSeconds"]) == (2, None)


def test_without_a_start_the_first_reservation_opens_the_sale(
    within: Within, reported: Callable[[str], dict[str, Any]], spec: SaleSpec
) -> None:
    within(lambda shop: reserve(shop, replace(spec, stock=2), 5, 6.5))
    found = reported(spec.item_id)
    assert found["openedAt"] == found["firstReservedAt"]
    assert found["allReservedSeconds"] == 1.5
    assert found["rate"]["firstMinute"] == [1, 1]


def test_a_refused_reservation_sells_nothing(
    within: Within, reported: Callable[[str], dict[str, Any]], spec: SaleSpec
) -> None:
    within(lambda shop: reserve(shop, replace(spec, stock=1), 1, 2, state="refused"))
    found = reported(spec.item_id)
    assert found["counts"]["refused"] == {"reservations": 2, "units": 2}
    assert (found["buyers"], found["openedAt"], found["rate"]) == (0, None, None)
    assert found["allReservedSeconds"] is None


def test_a_long_sale_has_a_bounded_number_of_bars(
    within: Within, reported: Callable[[str], dict[str, Any]], spec: SaleSpec
) -> None:
    days = [0, 59.9, 60, *(86_400 * day for day in range(1, 31))]
    within(lambda shop: reserve(shop, replace(spec, stock=100), *days))
    rate = reported(spec.item_id)["rate"]
    assert rate["barSeconds"] % 60 == 0
    assert len(rate["firstMinute"]) == FIRST_SECONDS
    assert len(rate["later"]) <= MAX_BARS + 1
    assert (sum(rate["firstMinute"]), sum(rate["later"])) == (2, len(days) - 2)


def test_the_text_has_the_figures_and_a_chart(ctl: Ctl, within: Within, spec: SaleSpec) -> None:
    within(lambda shop: reserve(shop, replace(spec, stock=4), 0, 0.1, 0.2, 1))
    code, lines, errors = ctl("report", spec.item_id)
    assert (code, errors) == (0, [])
    assert lines[0] == f"Sale {spec.sale_id} of {spec.item_id}"
    assert "Confirmed         4 units in 4 reservations" in lines
    assert "All reserved      1.000 s after the opening" in lines
    begin = lines.index("Reservations per second of the first minute, at most 3:")
    assert lines[begin + 1] == "  █▃"


@pytest.mark.usefixtures("topic")
def test_the_file_is_html_without_scripts_and_requests(
    ctl: Ctl, within: Within, spec: SaleSpec, tmp_path: Path
) -> None:
    within(lambda shop: reserve(shop, replace(spec, display_name=NAME), 0, 1, 90))
    path = tmp_path / "report.html"
    assert ctl("report", spec.item_id, "--html", str(path)) == (0, [f"the report is in {path}"], [])
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    assert not page.tags & {"script", "link", "img", "iframe", "object", "form", "a", "base"}
    assert not page.attributes & {"href", "src", "xlink:href", "srcset", "onload", "onclick"}
    assert "url(" not in page.text
    assert f"Sale {spec.sale_id} of {NAME} ({spec.item_id})" in page.text
    assert page.labels == [
        "Reservations per second of the first minute, at most 1",
        "Reservations per minute after it, at most 1",
    ]
    assert "prefers-color-scheme: dark" in page.text
    assert page.policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_one_file_has_the_sales_of_several_items(
    ctl: Ctl, within: Within, spec: SaleSpec, tmp_path: Path
) -> None:
    another = SaleSpec("default/another", "another", 1)

    async def apply(shop: SimulatedShop) -> None:
        await shop.apply(spec)
        await shop.apply(another)

    within(apply)
    path = tmp_path / "report.html"
    assert ctl("report", spec.item_id, "another", "--html", str(path))[0] == 0
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    for sale_id in (spec.sale_id, another.sale_id):
        assert f"Sale {sale_id} of " in page.text
    assert page.labels == []  # nothing was reserved


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "Kafka is away"),
        ({"FLASHSALE_REDIS_URL": f"redis://{NOWHERE}/0"}, "Redis is unavailable"),
    ],
)
def test_a_report_needs_only_the_ledger(
    ctl: Ctl, within: Within, spec: SaleSpec, changes: dict[str, str], reason: str
) -> None:
    within(lambda shop: reserve(shop, spec, 1))
    code, lines, errors = ctl("report", spec.item_id, **changes)
    assert (code, errors) == (0, [])
    assert "Confirmed         1 unit in 1 reservation" in lines
    begin = next(number for number, line in enumerate(lines) if line.startswith("Audit at "))
    assert lines[begin].endswith(": not audited")
    assert lines[begin + 1].startswith(f"  {reason}")


@pytest.mark.usefixtures("topic")
def test_the_verdict_has_its_reasons(
    ctl: Ctl, redis_server: RedisServer, within: Within, spec: SaleSpec
) -> None:
    within(lambda shop: reserve(shop, spec, 1))
    Redis.from_url(redis_server.url).flushall()
    _, lines, _ = ctl("report", spec.item_id)
    begin = next(number for number, line in enumerate(lines) if line.startswith("Audit at "))
    assert lines[begin].endswith(": DISAGREES")
    assert "  Redis has no keys of the sale" in lines[begin:]


def test_mistakes_are_one_line(ctl: Ctl, within: Within, spec: SaleSpec, tmp_path: Path) -> None:
    within(lambda shop: reserve(shop, spec))
    missing = tmp_path / "missing" / "report.html"
    assert ctl("report", spec.item_id, "--html", str(missing)) == (
        1,
        [],
        [f"flashsalectl: {missing}: cannot be written: No such file or directory"],
    )
    code, lines, [error] = ctl("report", f"{spec.item_id}x")
    assert (code, lines) == (1, [])
    assert error.endswith(f"there is no sale of this item; did you mean {spec.item_id}?")
    code, _, errors = ctl("report", spec.item_id, "--html", str(missing), "-o", "json")
    assert (code, errors[-1]) == (2, "Error: -o and --html exclude each other.")


class Page(HTMLParser):
    """The parts of a page that a browser would act on."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.labels: list[str] = []
        self.policies: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.attributes.update(values)
        if tag == "svg":
            self.labels.append(values["aria-label"] or "")
        if tag == "meta" and values.get("http-equiv") == "Content-Security-Policy":
            self.policies.append(values["content"] or "")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
