"""`flashsalectl reservations`, `confirm` and `cancel`, for people in trouble."""

import asyncio
import csv
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dev.stack.servers import KafkaServer
from flashsale.heartbeat import ACKNOWLEDGED_SECONDS
from flashsale.reservations import OutboxEntry, Transition
from flashsale.sale import SaleSpec
from flashsale.settings import KafkaSettings
from flashsale_consumer import topics
from flashsale_operator.ctl import commands
from flashsale_operator.ctl.reservations import PAGE
from flashsale_operator.sales import transitions
from flashsale_operator.sales.rebuild import Rebuilt
from tests.support.ctl import Ctl, Within
from tests.support.simulated_shop import SimulatedShop


@pytest.fixture
def spec(item: str) -> SaleSpec:
    return SaleSpec(f"default/{item}", item, 10, hold_seconds=600)


@pytest.fixture
def ids(within: Within, spec: SaleSpec, environ: dict[str, str]) -> dict[str, str]:  # noqa: ARG001
    """A recorded sale: ann has a hold, bob a confirmed reservation, and cat an expired hold."""
    found: dict[str, str] = {}

    async def sell(shop: SimulatedShop) -> None:
        await shop.apply(spec)
        await shop.buy(spec.item_id, "ann", "bob", "cat")
        assert await shop.confirm(spec.item_id, "bob", "order-7") is Transition.CHANGED
        await shop.expire(spec.item_id, "cat")
        await shop.record(spec.item_id)
        for user in ("ann", "bob", "cat"):
            found[user] = await shop.reservation_of(spec.item_id, user)

    within(sell)
    return found


def test_the_reservations_are_a_table(ctl: Ctl, spec: SaleSpec, ids: dict[str, str]) -> None:
    code, [head, *lines], _ = ctl("reservations", spec.item_id)
    assert code == 0
    columns = "RESERVATION SALE USER QUANTITY STATE ACCEPTED EXPIRES CONFIRMED ORDER"
    assert head.split() == columns.split()
    rows = {line.split()[2]: line.split() for line in lines}
    assert rows["ann"][:5] == [ids["ann"], spec.sale_id, "ann", "1", "held"]
    assert rows["ann"][7:] == ["-", "-"]
    assert rows["bob"][4] == "confirmed"
    assert rows["bob"][8] == "order-7"
    assert rows["cat"][4] == "expired"


def test_the_reservations_are_csv(ctl: Ctl, spec: SaleSpec, ids: dict[str, str]) -> None:
    code, lines, _ = ctl("reservations", spec.item_id, "-o", "csv")
    assert code == 0
    rows = {row["userId"]: row for row in csv.DictReader(lines)}
    assert {user: row["reservationId"] for user, row in rows.items()} == ids
    assert (rows["bob"]["state"], rows["bob"]["orderRef"]) == ("confirmed", "order-7")
    assert (rows["ann"]["confirmedAt"], rows["ann"]["orderRef"]) == ("", "")


def test_a_spreadsheet_runs_no_value_of_the_csv_as_a_formula(
    ctl: Ctl, within: Within, spec: SaleSpec
) -> None:
    async def sell(shop: SimulatedShop) -> None:
        await shop.apply(spec)
        await shop.buy(spec.item_id, "=1+1", "+1", "-1", "@a", "a=1")
        await shop.confirm(spec.item_id, "a=1", "=2+5")
        await shop.record(spec.item_id)

    within(sell)
    rows = list(csv.DictReader(ctl("reservations", spec.item_id, "-o", "csv")[1]))
    assert {row["userId"] for row in rows} == {"'=1+1", "'+1", "'-1", "'@a", "a=1"}
    assert {row["orderRef"] for row in rows} == {"", "'=2+5"}
    listed = json.loads("\n".join(ctl("reservations", spec.item_id, "-o", "json")[1]))
    assert "=1+1" in {row["userId"] for row in listed}


def test_the_columns_of_the_csv_are_stable(ctl: Ctl, spec: SaleSpec, ids: dict[str, str]) -> None:  # noqa: ARG001
    """Other programs read them by name or by position. New ones come last."""
    head = ctl("reservations", spec.item_id, "-o", "csv")[1][0]
    columns = "reservationId,saleId,userId,quantity,state,version,acceptedAt,expiresAt"
    assert head.startswith(f"{columns},confirmedAt,orderRef")


def test_the_reservations_are_json(ctl: Ctl, spec: SaleSpec, ids: dict[str, str]) -> None:
    code, lines, _ = ctl("reservations", spec.item_id, "-o", "json")
    assert code == 0
    rows = {row["userId"]: row for row in json.loads("\n".join(lines))}
    assert {user: row["reservationId"] for user, row in rows.items()} == ids
    assert rows["ann"].keys() == {
        "reservationId",
        "saleId",
        "userId",
        "quantity",
        "state",
        "version",
        "acceptedAt",
        "expiresAt",
    }
    assert (rows["bob"]["version"], rows["bob"]["orderRef"]) == (2, "order-7")


@pytest.mark.parametrize(("output", "empty"), [("json", ["[]"]), ("csv", 1), ("table", 1)])
def test_a_sale_without_reservations_has_an_empty_list(
    ctl: Ctl, within: Within, spec: SaleSpec, output: str, empty: list[str] | int
) -> None:
    async def apply(shop: SimulatedShop) -> None:
        await shop.apply(spec)

    within(apply)
    code, lines, _ = ctl("reservations", spec.item_id, "-o", output)
    assert code == 0
    assert lines == empty if isinstance(empty, list) else len(lines) == empty


@pytest.mark.parametrize("output", ["table", "csv", "json"])
def test_many_reservations_are_printed_once_each_and_a_reader_may_stop(
    ctl: Ctl, within: Within, environ: dict[str, str], spec: SaleSpec, output: str
) -> None:
    number = 2 * PAGE + 3

    async def fill(shop: SimulatedShop) -> None:
        await shop.apply(replace(spec, stock=number))
        await shop.pool.execute(
            "INSERT INTO reservations (sale_id, reservation_id, user_id, quantity, state, version, "
            "accepted_at) SELECT $1, gen_random_uuid(), 'user' || n, 1, 'confirmed', 1, now() "
            "FROM generate_series(1, $2) n",
            spec.sale_id,
            number,
        )

    within(fill)
    code, lines, _ = ctl("reservations", spec.item_id, "-o", output)
    around = {"table": 1, "csv": 1, "json": 2}
    assert (code, len(lines)) == (0, number + around[output])
    assert len(set(lines)) == len(lines)
    program = Path(sys.executable).with_name("flashsalectl")

    def in_a_shell(redirection: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            f"{program} reservations {spec.item_id} -o {output} {redirection}",
            shell=True,
            env=os.environ | environ,
            capture_output=True,
            text=True,
            check=False,
        )

    done = in_a_shell("| head -n 2")
    assert (done.stdout.splitlines(), done.stderr) == (lines[:2], "")
    done = in_a_shell("> /dev/full")
    full = "flashsalectl: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, full)


def test_a_delete_frees_the_keys_only_after_the_ledger_has_the_end_of_each_hold(
    ctl: Ctl, within: Within, spec: SaleSpec, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ids["ann"]
    unrecorded: list[OutboxEntry] = []

    async def confirm(shop: SimulatedShop) -> None:
        assert await shop.confirm(spec.item_id, "ann") is Transition.CHANGED
        unrecorded.extend((await shop.outbox.page(spec.item_id, until_ms=2**50, count=10)).entries)
        await shop.record(spec.item_id, lose=1)

    async def record(shop: SimulatedShop) -> None:
        await shop.write(unrecorded[0])

    within(confirm)
    monkeypatch.setattr(commands, "DELETE_LOOKS", 2)
    stays = f"sale {spec.sale_id} closed: its keys stay until the ledger has all its events"
    assert ctl("delete", spec.item_id) == (1, [], [stays])
    within(record)
    freed = f"sale {spec.sale_id} deleted: its keys are freed, and the ledger keeps its rows"
    assert ctl("delete", spec.item_id) == (0, [freed], [])


@pytest.mark.usefixtures("ids")
def test_a_delete_names_the_cause_that_no_wait_ends(
    ctl: Ctl, within: Within, spec: SaleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lose_the_run(shop: SimulatedShop) -> None:
        await shop.change_run(spec.item_id)

    async def rebuild_and_refuse(shop: SimulatedShop) -> None:
        assert isinstance(await shop.rebuild(spec), Rebuilt)
        assert await shop.cancel(spec.item_id, "ann") is Transition.CHANGED
        await shop.record(spec.item_id)
        await shop.pool.execute(
            "UPDATE reservations SET state = 'refused' WHERE state = 'confirmed'"
        )
        await shop.pool.execute("UPDATE sales SET accepted = accepted - 1")

    monkeypatch.setattr(commands, "DELETE_LOOKS", 1)
    stays = f"sale {spec.sale_id} closed: its keys stay, because "
    code, lines, [error] = ctl("delete", spec.item_id)
    assert (code, lines) == (1, [])
    assert error.startswith(f"{stays}it has open holds of 1 unit: confirm or cancel them")
    within(lose_the_run)
    [error] = ctl("delete", spec.item_id)[2]
    rebuild = f"run `flashsalectl rebuild {spec.item_id}`"
    assert error.startswith(f"{stays}Redis restarted or lost keys of the sale: {rebuild}")
    within(rebuild_and_refuse)
    [error] = ctl("delete", spec.item_id)[2]
    assert error.startswith(f"{stays}the ledger refused 1 reservation, ")


def test_without_kafka_nothing_is_changed(
    ctl: Ctl, within: Within, spec: SaleSpec, ids: dict[str, str]
) -> None:
    code, lines, [error] = ctl("confirm", spec.item_id, ids["ann"], "--order-ref", "order-1")
    assert (code, lines) == (1, [])
    assert error.startswith("flashsalectl: Kafka is away, and nothing is changed: ")

    async def still_held(shop: SimulatedShop) -> None:
        sale = await shop.sale(spec.item_id)
        assert sale is not None
        assert sale.held == 1

    within(still_held)


@pytest.mark.slow
def test_a_person_repeats_a_call_whose_time_ran_out_in_redis(
    ctl: Ctl,
    environ: dict[str, str],
    spec: SaleSpec,
    ids: dict[str, str],
    kafka_server: KafkaServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rebuild could have begun since then, and the ledger would not count the event."""
    environ["FLASHSALE_KAFKA_BOOTSTRAP"] = kafka_server.bootstrap
    asyncio.run(topics.create(KafkaSettings(kafka_bootstrap=kafka_server.bootstrap)))
    clock = itertools.count(step=ACKNOWLEDGED_SECONDS + 1)
    confirm = "confirm", spec.item_id, ids["ann"], "--order-ref", "order-1"
    with monkeypatch.context() as patch:
        patch.setattr(transitions, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        code, lines, [error] = ctl(*confirm)
    assert (code, lines) == (1, [])
    assert error.endswith("but Kafka has not acknowledged it in time: run it again")
    assert ctl(*confirm)[0] == 0


@pytest.mark.slow
def test_a_person_confirms_and_cancels(
    ctl: Ctl,
    within: Within,
    environ: dict[str, str],
    spec: SaleSpec,
    ids: dict[str, str],
    kafka_server: KafkaServer,
) -> None:
    environ["FLASHSALE_KAFKA_BOOTSTRAP"] = kafka_server.bootstrap
    kafka = KafkaSettings(kafka_bootstrap=kafka_server.bootstrap)
    asyncio.run(topics.create(kafka))
    ann, bob, cat = ids["ann"], ids["bob"], ids["cat"]

    def call(verb: str, reservation: str, order_ref: str = "") -> tuple[int, str]:
        named = ["--order-ref", order_ref] if order_ref else []
        code, lines, errors = ctl(verb, spec.item_id, reservation, *named)
        [line] = lines + errors
        assert bool(errors) is bool(code)
        return code, line

    assert call("confirm", ann, "order-1") == (0, f"{ann} is confirmed for order order-1")
    assert call("confirm", ann, "order-1") == (0, f"{ann} was confirmed for order order-1 before")
    assert call("confirm", ann, "order-2") == (
        1,
        f"{ann} is confirmed for another order than order-2",
    )
    assert call("confirm", cat, "order-3") == (1, f"{cat} has expired, so it cannot be confirmed")
    assert call("cancel", cat) == (0, f"{cat} was cancelled or had expired before")
    assert call("cancel", bob) == (1, f"{bob} is confirmed: name its order with --order-ref")
    assert call("cancel", bob, "order-7") == (
        0,
        f"{bob} is cancelled, and its units are for sale again",
    )
    assert call("confirm", bob, "order-7") == (1, f"{bob} was cancelled, so it cannot be confirmed")
    unknown = "00000000-0000-7000-8000-000000000000"
    assert call("cancel", unknown) == (
        1,
        f"{unknown} is no reservation of this item in Redis",
    )

    async def settled(shop: SimulatedShop) -> None:
        sale = await shop.sale(spec.item_id)
        assert sale is not None
        assert sale.outbox_length == 0
        assert (sale.accepted, sale.released, sale.held) == (3, 2, 0)
        await shop.change_run(spec.item_id)

    within(settled)
    fenced = f"flashsalectl: {spec.item_id}: the sale is fenced: rebuild it first"
    assert call("cancel", ann, "order-1") == (1, fenced)
    code, _, [error] = ctl("cancel", "nothing", ann)
    assert (code, error) == (1, "flashsalectl: nothing: Redis has no sale of this item")
