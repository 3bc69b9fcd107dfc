"""The command line of `flashsalectl`: its output and exit codes, and no tracebacks."""

import asyncio
import io
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from redis import Redis

from dev.stack.servers import KafkaServer, RedisServer
from flashsale import events
from flashsale.events import Event
from flashsale.keys import ItemKeys
from flashsale.settings import KafkaSettings
from flashsale_operator.ctl.commands import run
from flashsale_operator.sales import offsets
from flashsale_operator.sales.manifest import parse
from tests.support.paths import ROOT
from tests.support.simulated_shop import SimulatedShop

SAMPLE = ROOT / "k8s/samples/iphone-15.yaml"
NOWHERE = "127.0.0.1:1"
HEAD = "ITEM        SALE                STATE     ALLOCATED   AVAILABLE   ACCEPTED   RECORDED"

Within = Callable[[Callable[[SimulatedShop], Awaitable[None]]], None]
Ctl = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def environ(redis_server: RedisServer, database_url: str) -> dict[str, str]:
    Redis.from_url(redis_server.url).flushall()
    return {
        "FLASHSALE_REDIS_URL": redis_server.url,
        "FLASHSALE_DATABASE_URL": database_url,
        "FLASHSALE_KAFKA_BOOTSTRAP": NOWHERE,
    }


@pytest.fixture
def ctl(environ: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Ctl:
    """Return a function that runs a command line.

    It returns the exit code, the output lines and the error lines.
    """

    def call(*arguments: str, **changes: str) -> tuple[int, list[str], list[str]]:
        code = run(arguments, environ | changes)
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return call


def a_file(folder: Path, **spec: object) -> str:
    """Write the sample with changed fields of its spec, and return its path."""
    text = SAMPLE.read_text()
    for name, value in spec.items():
        text = "".join(
            line for line in text.splitlines(keepends=True) if not line.startswith(f"  {name}:")
        )
        text += f"  {name}: {value}\n"
    path = folder / "sale.yaml"
    path.write_text(text)
    return str(path)


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
        ["iphone_15", "default/iphone-15", "Selling", "150", "150", "0", "0", "-", "-"]
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


def test_get_shows_sales_that_only_one_store_has(
    ctl: Ctl, environ: dict[str, str], within: Within
) -> None:
    ctl("apply", "-f", str(SAMPLE))

    async def lose_the_row(shop: SimulatedShop) -> None:
        await shop.pool.execute("DELETE FROM sales")

    within(lose_the_row)
    assert ctl("get")[1][1].split()[2:] == ["Selling", "100", "100", "0", "-", "-", "-"]
    ctl("apply", "-f", str(SAMPLE))
    Redis.from_url(environ["FLASHSALE_REDIS_URL"]).flushall()
    assert ctl("get")[1][1].split()[2:] == ["Fenced", "100", "-", "-", "0", "-", "-"]


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


def test_a_refused_manifest_is_reported_with_the_next_step(ctl: Ctl, tmp_path: Path) -> None:
    ctl("apply", "-f", str(SAMPLE))
    rival = tmp_path / "rival.yaml"
    rival.write_text(SAMPLE.read_text().replace("name: iphone-15", "name: rival"))
    conflict = (
        "sale default/rival unchanged: ItemConflict, iphone_15 is sold by default/iphone-15, "
        "which is Selling; apply it again when that sale is closed "
        "(`flashsalectl close iphone_15`) and recorded"
    )
    assert ctl("apply", "-f", str(rival)) == (1, [], [conflict])
    moved = (
        "sale default/iphone-15 unchanged: Unknown (ItemChanged), spec.itemId is immutable: "
        "default/iphone-15 sells iphone_15, and another item needs a FlashSale of another name"
    )
    assert ctl("apply", "-f", a_file(tmp_path, itemId="iphone_16")) == (1, [], [moved])


def test_a_flushed_sale_stays_fenced_without_kafka(
    ctl: Ctl, environ: dict[str, str], within: Within
) -> None:
    ctl("apply", "-f", str(SAMPLE))

    async def sell(shop: SimulatedShop) -> None:
        await shop.buy("iphone_15", "ann", "bob")
        await shop.record("iphone_15")

    within(sell)
    Redis.from_url(environ["FLASHSALE_REDIS_URL"]).flushall()
    code, lines, [error] = ctl("apply", "-f", str(SAMPLE))
    assert (code, lines) == (1, [])
    assert error.startswith("sale default/iphone-15 unchanged: Fenced, Kafka is away: ")
    assert error.endswith("apply it again, or run `flashsalectl rebuild iphone_15`")


def test_each_mistake_of_each_file_is_one_line(ctl: Ctl, tmp_path: Path) -> None:
    bad = a_file(tmp_path, stock=-1, maxPerUser="many", color="red")
    missing = str(tmp_path / "missing.yaml")
    assert ctl("apply", "-f", bad, "-f", missing, "-f", str(SAMPLE), "-f", str(SAMPLE)) == (
        1,
        [],
        [
            f"flashsalectl: {bad}: spec.color: unknown field",
            f"flashsalectl: {bad}: spec.stock: must be an integer from 0 to 100000000",
            f"flashsalectl: {bad}: spec.maxPerUser: must be an integer from 1 to 1000",
            f"flashsalectl: {missing}: cannot be read: No such file or directory",
            f"flashsalectl: {SAMPLE}: metadata.name: default/iphone-15 appears twice",
        ],
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "not YAML: expected ',' or ']', but got '<stream end>' in line 1"),
        (b"\xff", "cannot be read: not UTF-8"),
        (b" " * (1024 * 1024 + 1), "cannot be read: larger than 1 MiB"),
        (b"", "contains no FlashSale"),
    ],
)
def test_the_error_about_a_bad_file_is_one_line(
    ctl: Ctl, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert ctl("apply", "-f", str(path)) == (1, [], [f"flashsalectl: {path}: {message}"])
    assert ctl("apply", "-f", str(tmp_path)) == (
        1,
        [],
        [f"flashsalectl: {tmp_path}: cannot be read: Is a directory"],
    )


@pytest.mark.parametrize("command", ["get", "close", "audit"])
def test_the_error_about_an_unknown_item_is_one_line(
    ctl: Ctl, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def spans(_: str) -> dict[int, offsets.Span]:
        return {}

    monkeypatch.setattr(offsets, "spans", spans)
    ctl("apply", "-f", str(SAMPLE))
    assert ctl(command, "nothing") == (
        1,
        [],
        ["flashsalectl: nothing: there is no sale of this item"],
    )


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FLASHSALE_REDIS_URL", "localhost", "is wrong: expected redis://"),
        ("FLASHSALE_REDIS_URL", "redis://h:port/0", "is wrong: expected"),
        ("FLASHSALE_DATABASE_URL", "mysql://secret@h", "is wrong: expected postgresql://"),
        ("FLASHSALE_DATABASE_URL", "postgresql://u:secret@h:port/db", "is wrong: expected"),
        ("FLASHSALE_KAFKA_BOOTSTRAP", "localhost", "is wrong: expected host:port"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(
    ctl: Ctl, variable: str, value: str, message: str
) -> None:
    code, lines, [error] = ctl("apply", "-f", str(SAMPLE), **{variable: value})
    assert (code, lines) == (2, [])
    assert error.startswith(f"flashsalectl: {variable} {message}")
    assert "secret" not in error


def test_a_command_asks_only_for_the_addresses_it_needs(
    environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    del environ["FLASHSALE_KAFKA_BOOTSTRAP"]
    assert run(["audit"], environ) == 2
    assert capsys.readouterr().err.startswith("flashsalectl: FLASHSALE_KAFKA_BOOTSTRAP is not set")
    assert run(["get"], environ) == 1
    assert "FLASHSALE" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"FLASHSALE_REDIS_URL": f"redis://{NOWHERE}/0"}, "Redis is unavailable"),
        ({"FLASHSALE_DATABASE_URL": f"postgresql://{NOWHERE}/db"}, "the ledger is unavailable"),
        ({}, "Kafka is away"),
    ],
)
def test_the_error_about_a_server_that_is_away_is_one_line(
    ctl: Ctl, changes: dict[str, str], message: str
) -> None:
    ctl("apply", "-f", str(SAMPLE))
    for command in (["apply", "-f", str(SAMPLE)], ["get"], ["close", "iphone_15"], ["audit"]):
        if not changes and command != ["audit"]:
            continue
        code, lines, [error] = ctl(*command, **changes)
        assert (code, lines) == (1, [])
        assert error.startswith(f"flashsalectl: {message}")


def test_a_redis_that_evicts_keys_is_refused(ctl: Ctl, environ: dict[str, str]) -> None:
    redis = Redis.from_url(environ["FLASHSALE_REDIS_URL"])
    redis.config_set("maxmemory-policy", "volatile-ttl")
    try:
        code, _, [error] = ctl("apply", "-f", str(SAMPLE))
    finally:
        redis.config_set("maxmemory-policy", "noeviction")
    assert code == 1
    assert error.startswith("flashsalectl: Redis' maxmemory-policy is volatile-ttl")


def test_the_installed_command_prints_only_its_own_lines(environ: dict[str, str]) -> None:
    """In a separate process, log lines and warnings of libraries would show."""
    program = Path(sys.executable).with_name("flashsalectl")

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *arguments],
            env=os.environ | environ,
            capture_output=True,
            text=True,
            check=False,
        )

    assert call("apply", "-f", str(SAMPLE)).stderr == ""
    audited = call("audit")
    assert (audited.returncode, audited.stdout) == (1, "")
    assert audited.stderr.count("\n") == 1
    assert audited.stderr.startswith("flashsalectl: Kafka is away")


@pytest.mark.parametrize("command", ["apply", "get", "close", "rebuild", "audit", "republish"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run([command, "--help"], {})
    assert capsys.readouterr().out.startswith(f"usage: flashsalectl {command}")


@pytest.mark.parametrize("arguments", [[], ["sell"], ["apply"], ["close"], ["get", "a", "b"]])
def test_a_wrong_command_line_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(arguments, {})
    assert capsys.readouterr().err.startswith("usage: flashsalectl")


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
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
        await admin.start()
        if events.topic() not in await admin.list_topics():
            await admin.create_topics([NewTopic(events.topic(), 3, 1)])
        await admin.close()
        await read_all(shop)

    async def sell_and_publish(shop: SimulatedShop) -> None:
        await shop.buy("iphone_15", "ann", "bob")
        producer = AIOKafkaProducer(bootstrap_servers=kafka, acks="all")
        await producer.start()
        for entry in await shop.outbox.page("iphone_15", until_ms=2**50, count=10):
            event = Event.of("iphone_15", entry.reservation_id, entry.record, entry.snapshot)
            await producer.send_and_wait(events.topic(), events.encode(event), partition=1)
        await producer.stop()

    assert asyncio.run(offsets.spans(KafkaSettings(kafka_bootstrap=kafka, engine="no-such"))) == {}
    ctl("apply", "-f", str(SAMPLE))
    within(prepare)
    within(sell_and_publish)
    code, [_, line], _ = ctl("audit", "iphone_15")
    assert (code, line.split()[3:]) == (0, ["100", "2", "0", "2", "2", "in", "flight"])

    within(lambda shop: shop.record("iphone_15", lose=1))
    code, [_, line], _ = ctl("audit")
    assert (code, line.split()[3:]) == (0, ["100", "2", "1", "0", "2", "in", "flight"])
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
    assert (code, line.split()[3:9]) == (0, ["100", "1", "1", "0", "0", "ok:"])
    assert line.endswith("lost before a rebuild: 1 unit")
