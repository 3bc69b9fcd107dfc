"""The command line of `flashsalectl`: its output and exit codes, and no tracebacks."""

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import yaml
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from redis import Redis

from dev.stack.servers import KafkaServer, RedisServer
from flashsale import __version__, events
from flashsale.events import Event
from flashsale.keys import ItemKeys
from flashsale.settings import KafkaSettings
from flashsale_operator.ctl.cli import flashsalectl
from flashsale_operator.ctl.commands import run
from flashsale_operator.sales import offsets
from flashsale_operator.sales.manifest import parse
from tests.support.manifests import flash_sale
from tests.support.paths import ROOT
from tests.support.redis_users import OPERATOR, url_of
from tests.support.simulated_shop import SimulatedShop

SAMPLE = ROOT / "k8s/samples/iphone-15.yaml"
NOWHERE = "127.0.0.1:1"
HEAD = (
    "ITEM        SALE                STATE     ALLOCATED   AVAILABLE   HELD   ACCEPTED   RECORDED"
)

Within = Callable[[Callable[[SimulatedShop], Awaitable[None]]], None]
Ctl = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def environ(redis_server: RedisServer, database_url: str) -> dict[str, str]:
    Redis.from_url(redis_server.url).flushall()
    return {
        "FLASHSALE_REDIS_URL": url_of(redis_server, OPERATOR),
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
        (b" " * (8 * 1024 * 1024 + 1), "cannot be read: larger than 8 MiB"),
        (b"", "contains no FlashSale"),
    ],
)
def test_the_error_about_a_bad_file_is_one_line(
    ctl: Ctl, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert ctl("apply", "-f", str(path)) == (1, [], [f"flashsalectl: {path}: {message}"])
    assert ctl("apply", "-f", str(tmp_path)) == (1, [], [f"flashsalectl: {path}: {message}"])


def test_a_directory_without_manifests_is_a_mistake(ctl: Ctl, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no manifest")
    assert ctl("apply", "-f", str(tmp_path)) == (
        1,
        [],
        [f"flashsalectl: {tmp_path}: contains no file that ends in .json, .yaml or .yml"],
    )


def test_an_export_without_sales_is_a_mistake(ctl: Ctl, tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text("apiVersion: v1\nkind: List\nitems: []\n")
    error = f"flashsalectl: {file}: contains no FlashSale"
    assert ctl("apply", "-f", str(file)) == (1, [], [error])


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


@pytest.mark.parametrize("command", ["get", "close", "audit", "reservations"])
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


def test_a_redis_that_evicts_keys_is_refused(ctl: Ctl, redis_server: RedisServer) -> None:
    redis = Redis.from_url(redis_server.url)
    redis.config_set("maxmemory-policy", "volatile-ttl")
    try:
        code, _, [error] = ctl("apply", "-f", str(SAMPLE))
    finally:
        redis.config_set("maxmemory-policy", "noeviction")
    assert code == 1
    assert error.startswith("flashsalectl: Redis has maxmemory-policy volatile-ttl, but needs")


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


@pytest.mark.parametrize("command", sorted(flashsalectl.commands))
def test_every_command_has_help_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, "--help"], {}) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"Usage: flashsalectl {command}")
    assert re.search(rf"Examples?:\n +.*flashsalectl {command}", printed)
    assert run(["--help"], {}) == 0
    assert f"\n  {command} " in capsys.readouterr().out


def test_the_version_is_that_of_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"], {}) == 0
    assert capsys.readouterr().out == f"flashsalectl {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sell"],
        ["apply"],
        ["close"],
        ["get", "a", "b"],
        ["reservations"],
        ["reservations", "a", "-o", "xml"],
        ["confirm", "a", str(uuid.UUID(int=1))],
        ["confirm", "a", "1", "--order-ref", "o-1"],
        ["confirm", "a", str(uuid.UUID(int=1)), "--order-ref", ""],
        ["confirm", "a", str(uuid.UUID(int=1)), "--order-ref", "o,1"],
        ["cancel", "a", str(uuid.UUID(int=10)).upper()],
        ["cancel", "a", str(uuid.UUID(int=10)), "--order-ref", "o\n"],
    ],
)
def test_a_wrong_command_line_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments, {}) == 2
    assert capsys.readouterr().err.startswith("Usage: flashsalectl")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["gte"], "Did you mean 'get'?"),
        (["get", "--outptu", "json"], "Did you mean '--output'?"),
    ],
)
def test_a_misspelled_command_or_option_gets_a_hint(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments, {}) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("wanted", ["iphone-15", "default/iphone-15", "Iphone15", "iphone_16"])
@pytest.mark.parametrize("command", ["get", "describe", "close", "delete", "reservations"])
def test_an_unknown_item_gets_the_nearest_item(ctl: Ctl, command: str, wanted: str) -> None:
    ctl("apply", "-f", str(SAMPLE))
    assert ctl(command, wanted) == (
        1,
        [],
        [f"flashsalectl: {wanted}: there is no sale of this item; did you mean iphone_15?"],
    )


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


@pytest.mark.parametrize(("output", "head"), [("table", 1), ("json", 0), ("yaml", 0)])
def test_a_watch_shows_each_change_until_it_is_interrupted(
    ctl: Ctl, environ: dict[str, str], output: str, head: int
) -> None:
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
        watching.send_signal(signal.SIGINT)
        assert watching.wait(timeout=60) == 130
        assert watching.stderr.read() == ""
    assert len(re.findall("ITEM ", shown)) == head
    assert shown.count("default/iphone-15") == 2


@pytest.fixture
def checkout(tmp_path: Path, environ: dict[str, str]) -> Path:
    """A checkout in which `make up` runs."""
    (tmp_path / ".local").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "pyproject.toml").touch()
    lines = "".join(f"{name}={value}\n" for name, value in environ.items())
    (tmp_path / ".local" / "env").write_text(f"{lines}PATH=/nowhere\nFLASHSALE_KAFKA_PASSWORD=s3\n")
    return tmp_path


def in_folder(folder: Path, *arguments: str, **changes: str) -> "subprocess.CompletedProcess[str]":
    own = {name: value for name, value in os.environ.items() if not name.startswith("FLASHSALE_")}
    return subprocess.run(
        [Path(sys.executable).with_name("flashsalectl"), *arguments],
        cwd=folder,
        env=own | changes,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_servers_of_the_checkout_are_found(ctl: Ctl, checkout: Path) -> None:
    ctl("apply", "-f", str(SAMPLE))
    for folder in (checkout, checkout / "docs"):
        done = in_folder(folder, "get")
        assert (done.returncode, done.stderr) == (0, "")
        assert "iphone_15" in done.stdout


def test_the_environment_wins_over_the_file_of_the_checkout(ctl: Ctl, checkout: Path) -> None:
    ctl("apply", "-f", str(SAMPLE))
    done = in_folder(checkout, "get", FLASHSALE_REDIS_URL=f"redis://{NOWHERE}/0")
    [error, origin] = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert error.startswith("flashsalectl: Redis is unavailable: ")
    assert origin == (
        f"flashsalectl: the servers that the environment lacks are those of {checkout}/.local/env"
    )
    assert "s3" not in done.stderr


def test_an_error_without_servers_names_the_missing_file(tmp_path: Path) -> None:
    (tmp_path / ".local").mkdir()
    (tmp_path / ".local" / "env").write_text("FLASHSALE_REDIS_URL=redis://elsewhere\n")
    done = in_folder(tmp_path, "get")  # the folder is no checkout
    [error, advice] = done.stderr.splitlines()
    assert done.returncode == 2
    assert error.startswith("flashsalectl: FLASHSALE_REDIS_URL is not set: expected redis://")
    assert "`make up`" in advice


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_has_a_completion_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell], {}) == 0
    assert f"_FLASHSALECTL_COMPLETE={shell}_complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("flashsalectl reb", "rebuild"),
        ("flashsalectl get --wa", "--watch"),
        ("flashsalectl get -o y", "yaml"),
        ("flashsalectl close ip", "iphone_15"),
    ],
)
def test_commands_options_and_items_are_completed(
    ctl: Ctl, environ: dict[str, str], words: str, completed: str
) -> None:
    ctl("apply", "-f", str(SAMPLE))
    done = subprocess.run(
        [Path(sys.executable).with_name("flashsalectl")],
        env=os.environ
        | environ
        | {
            "_FLASHSALECTL_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == (f"plain,{completed}\n", "")


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
