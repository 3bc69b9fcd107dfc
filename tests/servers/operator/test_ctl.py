"""The life of a sale by `flashsalectl`: the output and exit codes of its commands."""

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from aiokafka import AIOKafkaProducer
from redis import Redis

from dev.stack.servers import KafkaServer, RedisServer
from flashsale import events
from flashsale.events import Event
from flashsale.inventory import Freed
from flashsale.keys import ItemKeys
from flashsale.reservations import Outcome
from flashsale.sale import SaleSpec
from flashsale.settings import KafkaSettings
from flashsale_operator.ctl import tables
from flashsale_operator.kubernetes.queue import Key
from flashsale_operator.sales import offsets
from flashsale_operator.sales.documents import documents_of
from flashsale_operator.sales.manifest import parse
from tests.support.controllers import FakeKube, controller
from tests.support.ctl import HEAD, SAMPLE, Ctl, Within, a_file
from tests.support.manifests import flash_sale
from tests.support.simulated_shop import SimulatedShop
from tests.support.topics import create_topic


def test_the_sample_has_one_sale() -> None:
    [spec] = parse(SAMPLE.read_text())
    assert (spec.sale_id, spec.item_id, spec.stock) == ("default/iphone-15", "iphone_15", 100)


def test_a_sale_from_apply_to_close(ctl: Ctl, tmp_path: Path) -> None:
    sample = str(SAMPLE)
    assert ctl("apply", "-f", sample) == (
        0,
        ["sale default/iphone-15 seeded: Selling, 100 of 100 available"],
        [],
    )
    assert ctl("apply", "-f", sample)[1] == [
        "sale default/iphone-15 unchanged: Selling, 100 of 100 available"
    ]
    assert ctl("apply", "-f", a_file(tmp_path, stock=150))[1] == [
        "sale default/iphone-15 changed: Selling, 150 of 150 available"
    ]
    code, [head, line], _ = ctl("get")
    assert code == 0
    assert head.startswith(HEAD)
    assert line.split() == (
        ["iphone_15", "default/iphone-15", "Selling", "150", "150", "0", "0", "0", "-", "-"]
    )
    assert ctl("get", "iphone_15")[1] == [head, line]
    assert ctl("close", "iphone_15") == (
        0,
        ["sale default/iphone-15 closed: Closing, 0 units recorded"],
        [],
    )
    assert ctl("close", "iphone_15")[:2] == (
        0,
        ["sale default/iphone-15 unchanged: Closing, 0 units recorded"],
    )


def test_a_sale_of_a_flashsale_is_closed_by_force_with_a_warning(
    ctl: Ctl, within: Within, spec: SaleSpec
) -> None:
    """The operator is down. When it comes back, it opens the sale again."""
    name = spec.sale_id.partition("/")[2]

    async def declare(shop: SimulatedShop) -> None:
        await shop.reconciler.reconcile(spec, "uid-1")

    async def operator_is_back(shop: SimulatedShop) -> None:
        await controller(shop, FakeKube(spec)).reconcile(Key.of(spec.sale_id))
        assert await shop.buy(spec.item_id, "ann") == [Outcome.ACCEPTED]

    within(declare)
    code, out, [refusal] = ctl("close", spec.item_id)
    assert (code, out) == (1, [])
    assert f"Run `kubectl -n default delete flashsale {name}`, or add --force" in refusal
    code, [closed], [warning] = ctl("close", "--force", spec.item_id)
    assert (code, closed) == (0, f"sale {spec.sale_id} closed: Closing, 0 units recorded")
    assert "the next operator undoes this change" in warning
    assert warning.endswith(f"also run `kubectl -n default delete flashsale {name}`")
    within(operator_is_back)


def test_get_shows_sales_that_only_one_store_has(
    ctl: Ctl, redis_server: RedisServer, within: Within
) -> None:
    ctl("apply", "-f", str(SAMPLE))

    async def lose_the_row(shop: SimulatedShop) -> None:
        await shop.pool.execute("DELETE FROM sales")

    within(lose_the_row)
    assert ctl("get")[1][1].split()[2:] == ["Selling", "100", "100", "0", "0", "-", "-", "-"]
    ctl("apply", "-f", str(SAMPLE))
    Redis.from_url(redis_server.url).flushall()
    assert ctl("get")[1][1].split()[2:] == ["Fenced", "100", "-", "0", "-", "0", "-", "-"]


def test_apply_reads_standard_input_and_several_files(
    ctl: Ctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SAMPLE.read_text().replace("iphone-15", "other").replace("iphone_15", "other")
    stdin = io.TextIOWrapper(io.BytesIO(f"{other}\n---\n".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    code, lines, _ = ctl(
        "apply", "-f", "-", "-f", a_file(tmp_path, startsAt="2999-01-01T00:00:00Z")
    )
    assert code == 0
    assert lines == [
        "sale default/other seeded: Selling, 100 of 100 available",
        "sale default/iphone-15 seeded: Scheduled, 100 of 100 available",
    ]


def test_a_flushed_sale_stays_fenced_without_kafka(
    ctl: Ctl, redis_server: RedisServer, within: Within
) -> None:
    ctl("apply", "-f", str(SAMPLE))

    async def sell(shop: SimulatedShop) -> None:
        await shop.buy("iphone_15", "ann", "bob")
        await shop.record("iphone_15")

    within(sell)
    Redis.from_url(redis_server.url).flushall()
    code, lines, [error] = ctl("apply", "-f", str(SAMPLE))
    assert (code, lines) == (1, [])
    assert error.startswith("sale default/iphone-15 unchanged: Fenced, Kafka is away: ")
    assert error.endswith("apply it again, or run `flashsalectl rebuild iphone_15`")


def test_directories_lists_and_several_files_are_applied(ctl: Ctl, tmp_path: Path) -> None:
    """The files of `kubectl apply -f`, such as the export of a lost cluster."""
    folder = tmp_path / "sales"
    (folder / "archive.yaml").mkdir(parents=True)
    listed = [flash_sale(name, stock=1) for name in ("a", "b")]
    export = {"apiVersion": "v1", "kind": "List", "items": listed}
    (folder / "export.json").write_text(json.dumps(export, indent="\t"))
    for name in ("c", "d", "e"):
        file = (folder if name == "c" else tmp_path) / f"{name}.yml"
        file.write_text(yaml.safe_dump(flash_sale(name, stock=1)))
    code, lines, errors = ctl(
        "apply", "-f", str(folder), "-f", f"{tmp_path}/d.yml,{tmp_path}/e.yml"
    )
    assert (code, errors) == (0, [])
    assert sorted(line.split()[1] for line in lines) == [f"default/{name}" for name in "abcde"]


def test_the_sales_are_json_and_yaml_with_the_same_fields(ctl: Ctl) -> None:
    ctl("apply", "-f", str(SAMPLE))
    [listed] = json.loads("\n".join(ctl("get", "-o", "json")[1]))
    assert (listed["itemId"], listed["state"], listed["available"]) == ("iphone_15", "Selling", 100)
    assert (listed["holdSeconds"], listed["declaredBy"]) == (None, None)
    assert yaml.safe_load("\n".join(ctl("get", "iphone_15", "-o", "yaml")[1])) == [listed]
    ctl("delete", "iphone_15")
    assert ctl("get", "-o", "json") == (0, ["[]"], [])
    assert ctl("get", "-o", "yaml") == (0, ["[]"], [])
    assert ctl("get") == (1, [], ["flashsalectl: there are no sales"])


def test_a_text_that_kubectl_reads_as_another_value_is_quoted_in_yaml(
    ctl: Ctl, tmp_path: Path
) -> None:
    names = {"5e10": "y", "0o17": "1.5e3", "n": "No", "1e3": "08", "ticket": "null"}
    file = tmp_path / "sales.json"
    sales = [
        flash_sale(f"sale-{number}", item, stock=1, displayName=name)
        for number, (item, name) in enumerate(names.items())
    ]
    file.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": sales}))
    assert ctl("apply", "-f", str(file))[0] == 0
    text = "\n".join(ctl("get", "-o", "yaml")[1])
    [listed] = documents_of(text)
    assert {sale["itemId"]: sale["displayName"] for sale in listed} == names
    assert yaml.safe_load(text) == listed == json.loads("\n".join(ctl("get", "-o", "json")[1]))


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1", "utf-8"])
def test_the_output_is_utf_8_in_every_locale(
    ctl: Ctl, environ: dict[str, str], tmp_path: Path, encoding: str
) -> None:
    ctl("apply", "-f", a_file(tmp_path, displayName="Écouteurs 🎧"))
    program = Path(sys.executable).with_name("flashsalectl")
    file = os.fsencode(tmp_path) + b"/r\xe9sum\xe9.html"
    for arguments, expected in (
        (("describe", "iphone_15"), "Écouteurs 🎧".encode()),
        (("report", "iphone_15", "--html", file), b"the report is in " + file),
    ):
        done = subprocess.run(
            [program, *arguments],
            env=os.environ | environ | {"PYTHONIOENCODING": encoding},
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert expected in done.stdout


def test_the_wide_table_has_more_columns(ctl: Ctl) -> None:
    ctl("apply", "-f", str(SAMPLE))
    _, [head, line], _ = ctl("get")
    _, [wide_head, wide_line], _ = ctl("get", "-o", "wide")
    assert wide_head.startswith(head)
    assert wide_line.startswith(line)
    columns = dict(zip(wide_head.split(), wide_line.split(), strict=True))
    assert (columns["MAXPERUSER"], columns["FLASHSALE"]) == ("1", "no")


def test_a_sale_is_described(ctl: Ctl, within: Within) -> None:
    ctl("apply", "-f", str(SAMPLE))

    async def sell(shop: SimulatedShop) -> None:
        await shop.buy("iphone_15", "ann", "bob")
        await shop.record("iphone_15")

    within(sell)
    code, lines, _ = ctl("describe", "iphone_15")
    described = dict(line.split(":", 1) for line in lines)
    assert (code, described["Sale"].strip()) == (0, "default/iphone-15")
    assert described["Available"].strip() == "98"
    assert described["Reservations"].strip() == "2 confirmed"
    assert "Next" not in described


def test_a_fenced_sale_is_described_with_the_next_step(ctl: Ctl, environ: dict[str, str]) -> None:
    ctl("apply", "-f", str(SAMPLE))
    redis = Redis.from_url(environ["FLASHSALE_REDIS_URL"])
    redis.hset(ItemKeys.of("iphone_15").sale, "run_id", "0" * 40)
    assert ctl("describe", "iphone_15")[1][-1].split(maxsplit=1) == [
        "Next:",
        "flashsalectl rebuild iphone_15",
    ]


def test_a_watch_of_an_unknown_item_is_an_error(ctl: Ctl) -> None:
    ctl("apply", "-f", str(SAMPLE))
    code, _, [error] = ctl("get", "iphone-15", "--watch", "-o", "json")
    assert (code, error.endswith("did you mean iphone_15?")) == (1, True)


def test_a_rebuild_leaves_a_whole_sale_alone(ctl: Ctl) -> None:
    """It needs no Kafka, and the sale keeps its revision."""
    ctl("apply", "-f", str(SAMPLE))
    assert ctl("rebuild", "iphone_15") == (
        0,
        ["sale default/iphone-15 needs no rebuild: 0 accepted units"],
        [],
    )
    assert ctl("apply", "-f", str(SAMPLE))[1] == [
        "sale default/iphone-15 unchanged: Selling, 100 of 100 available"
    ]


def test_a_rebuild_of_a_sale_without_units_is_reported(ctl: Ctl, within: Within) -> None:
    ctl("apply", "-f", str(SAMPLE))
    lines: list[str] = []

    async def rebuild(shop: SimulatedShop) -> None:
        await shop.change_run("iphone_15")
        [spec] = parse(SAMPLE.read_text())
        lines.append(tables.line_of_rebuild(spec.sale_id, await shop.rebuild(spec)))

    within(rebuild)
    assert re.match(r"sale default/iphone-15 rebuilt in \d+\.\d s: restored 0 ", lines[0])


@pytest.mark.parametrize("names", [["iphone_15"], ["--all"]])
def test_a_sale_that_lost_units_in_the_same_run_is_rebuilt(
    ctl: Ctl, within: Within, names: list[str]
) -> None:
    """Without Kafka the rebuild stops, but it has begun: the sale is fenced."""

    async def sell_and_lose_a_unit(shop: SimulatedShop) -> None:
        await shop.buy("iphone_15", "ann", "bob")
        await shop.record("iphone_15")
        keys = ItemKeys.of("iphone_15")
        await shop.redis.hdel(keys.buyers, "bob")
        await shop.redis.hset(keys.sale, "accepted", "1")

    ctl("apply", "-f", str(SAMPLE))
    within(sell_and_lose_a_unit)
    code, printed, [error] = ctl("rebuild", *names)
    assert (code, printed) == (1, [])
    assert error.startswith("sale default/iphone-15 stays fenced: Kafka is away")
    # The fence has no units, which must not look as if none were sold.
    assert ctl("get")[1][1].split()[2:] == ["Fenced", "100", "-", "0", "-", "2", "-", "-"]


@pytest.mark.parametrize("names", [["iphone_15"], ["--all"]])
def test_a_sale_that_was_closed_while_it_was_fenced_is_rebuilt(
    ctl: Ctl, redis_server: RedisServer, within: Within, names: list[str]
) -> None:
    """Without Kafka the rebuild stops. An older sale of the item needs none."""

    async def sell(shop: SimulatedShop) -> None:
        older = SaleSpec("default/iphone-14", "iphone_15", 5)
        await shop.apply(older)
        await shop.reconciler.close(older.sale_id)
        await shop.apply(parse(SAMPLE.read_text())[0])
        await shop.buy("iphone_15", "ann")
        await shop.record("iphone_15")

    within(sell)
    Redis.from_url(redis_server.url).flushall()
    assert ctl("apply", "-f", str(SAMPLE))[0] == 1
    assert ctl("close", "iphone_15")[0] == 0
    code, printed, [error] = ctl("rebuild", *names)
    assert (code, printed) == (1, [])
    assert error.startswith("sale default/iphone-15 stays fenced: Kafka is away")


@pytest.mark.parametrize("names", [["iphone_15"], ["--all"]])
def test_a_sale_that_only_the_ledger_has_closed_is_closed_by_a_rebuild(
    ctl: Ctl, within: Within, names: list[str]
) -> None:
    """It needs no Kafka."""

    async def close(shop: SimulatedShop) -> None:
        await shop.pool.execute("UPDATE sales SET closed = true, revision = revision + 1")

    async def closed(shop: SimulatedShop) -> None:
        assert await shop.buy("iphone_15", "ann") == [Outcome.ENDED]

    ctl("apply", "-f", str(SAMPLE))
    within(close)
    assert ctl("rebuild", *names)[0] == 0
    within(closed)


def test_a_closed_sale_with_open_holds_is_shown_if_redis_lost_it(
    ctl: Ctl, redis_server: RedisServer, within: Within, tmp_path: Path
) -> None:
    ctl("apply", "-f", a_file(tmp_path, holdSeconds=600))

    async def sell(shop: SimulatedShop) -> None:
        await shop.buy("iphone_15", "ann")
        await shop.record("iphone_15")

    within(sell)
    ctl("close", "iphone_15")
    Redis.from_url(redis_server.url).flushall()
    code, [_, line], _ = ctl("get")
    assert (code, line.split()[1:3]) == (0, ["default/iphone-15", "Fenced"])


@pytest.mark.parametrize(("output", "head"), [("table", 1), ("json", 0), ("yaml", 0)])
def test_a_watch_shows_each_change_until_it_is_interrupted(
    ctl: Ctl, environ: dict[str, str], redis_server: RedisServer, output: str, head: int
) -> None:
    """A sale is also shown when its keys are freed."""
    ctl("apply", "-f", str(SAMPLE))
    program = Path(sys.executable).with_name("flashsalectl")
    with subprocess.Popen(
        [program, "get", "--watch", "-o", output],
        env=os.environ | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        shown = ""
        while "Selling" not in shown:
            shown += watching.stdout.readline()
        ctl("close", "iphone_15")
        while "Closing" not in shown:
            shown += watching.stdout.readline()
        Redis.from_url(redis_server.url).delete(*ItemKeys.of("iphone_15").sold)
        while shown.count("default/iphone-15") < 3:
            shown += watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        assert watching.wait(timeout=60) == 130
        assert watching.stderr.read() == ""
    assert len(re.findall("ITEM ", shown)) == head
    assert shown.count("default/iphone-15") == 3


def test_an_ended_sale_is_fenced_if_redis_lost_it_and_ended_if_another_had_its_item_since(
    ctl: Ctl, within: Within
) -> None:
    ended = SaleSpec("default/ended", "iphone_15", 5, ends_ms=1)
    later = SaleSpec("default/later", "iphone_15", 5)

    async def lose(shop: SimulatedShop) -> None:
        await shop.apply(ended)
        await shop.redis.delete(*ItemKeys.of(ended.item_id).sold)

    async def sell_again(shop: SimulatedShop) -> None:
        await shop.apply(ended)
        assert (await shop.apply(later)).ready
        row = (await shop.reconciler.close(later.sale_id)).row
        assert row is not None
        freed = await shop.inventory.free(
            later.item_id, later.sale_id, row.revision, accepted=0, released=0
        )
        assert freed is Freed.FREED

    within(lose)
    for command in (("get",), ("get", "--all"), ("get", "iphone_15")):
        assert ctl(*command)[1][1].split()[2] == "Fenced"
    within(sell_again)
    for command in (("get",), ("get", "--all"), ("get", "iphone_15")):
        lines = [line.split() for line in ctl(*command)[1]]
        assert [line[2] for line in lines if "default/ended" in line] == ["Ended"]


@pytest.mark.slow
def test_an_audit_and_a_rebuild_with_kafka(
    ctl: Ctl, environ: dict[str, str], within: Within, kafka_server: KafkaServer
) -> None:
    """The test records the events itself, so that it controls each step."""
    kafka = kafka_server.bootstrap
    environ["FLASHSALE_KAFKA_BOOTSTRAP"] = kafka

    async def read_all(shop: SimulatedShop) -> None:
        for partition, span in (await offsets.spans(KafkaSettings(kafka_bootstrap=kafka))).items():
            await shop.read_to(partition, span.end)

    async def prepare(shop: SimulatedShop) -> None:
        await create_topic(kafka, events.topic(), 3)
        await read_all(shop)

    async def sell_and_publish(shop: SimulatedShop) -> None:
        await shop.buy("iphone_15", "ann", "bob")
        producer = AIOKafkaProducer(bootstrap_servers=kafka, acks="all")
        await producer.start()
        for entry in (await shop.outbox.page("iphone_15", until_ms=2**50, count=10)).entries:
            event = Event.of("iphone_15", entry.reservation_id, entry.record, entry.snapshot)
            await producer.send_and_wait(events.topic(), events.encode(event), partition=1)
        await producer.stop()

    assert asyncio.run(offsets.spans(KafkaSettings(kafka_bootstrap=kafka, engine="no-such"))) == {}
    ctl("apply", "-f", str(SAMPLE))
    within(prepare)
    within(sell_and_publish)
    code, [_, line], _ = ctl("audit", "iphone_15")
    assert (code, line.split()[3:]) == (0, ["100", "2", "0", "0", "2", "2", "in", "flight"])

    within(lambda shop: shop.record("iphone_15", lose=1))
    code, [_, line], _ = ctl("audit")
    assert (code, line.split()[3:]) == (0, ["100", "2", "0", "1", "0", "2", "in", "flight"])
    within(read_all)
    code, [_, line], _ = ctl("audit")
    assert code == 1
    assert line.endswith("DISAGREES: lost: 1 unit, not in ledger, outbox or topic")

    redis = Redis.from_url(environ["FLASHSALE_REDIS_URL"], decode_responses=True)
    redis.hset(ItemKeys.of("iphone_15").sale, "run_id", "0" * 40)
    code, [line], _ = ctl("apply", "-f", str(SAMPLE))
    assert code == 0
    assert line == (
        "sale default/iphone-15 rebuilt: Selling, 99 of 100 available; restored 1 accepted unit "
        "in 1 reservation from the ledger; missing in Redis: 0; lost: 1"
    )
    code, [_, line], _ = ctl("audit")
    assert (code, line.split()[3:10]) == (0, ["100", "1", "0", "1", "0", "0", "ok:"])
    assert line.endswith("lost before a rebuild: 1 unit")
