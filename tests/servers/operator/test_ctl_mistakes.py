"""`flashsalectl` answers each mistake and each outage with one line, and has help for all."""

import asyncio
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from redis import Redis

from dev.stack.servers import RedisServer
from flashsale import __version__, ledger
from flashsale.errors import LedgerUnavailable
from flashsale.keys import ItemKeys
from flashsale_operator.ctl.cli import flashsalectl, for_each
from flashsale_operator.ctl.commands import run
from flashsale_operator.sales import offsets
from flashsale_operator.sales.manifest import parse
from flashsale_operator.sales.reconciler import Reconciler, Result
from tests.support.ctl import NOWHERE, SAMPLE, Ctl, Within, a_file
from tests.support.ledgers import migrate_to
from tests.support.simulated_shop import SimulatedShop


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


def test_a_sale_that_cannot_be_applied_does_not_keep_the_others_from_it(
    ctl: Ctl, tmp_path: Path, environ: dict[str, str]
) -> None:
    ctl("apply", "-f", str(SAMPLE))
    with Redis.from_url(environ["FLASHSALE_REDIS_URL"]) as redis:
        redis.hset(ItemKeys.of("iphone_15").sale, "accepted", "many")
    other = tmp_path / "other.yaml"
    other.write_text(SAMPLE.read_text().replace("iphone-15", "other").replace("iphone_15", "other"))
    code, [line], [error] = ctl("apply", "-f", str(SAMPLE), "-f", str(other))
    assert code == 1
    assert line.startswith("sale default/other seeded: ")
    assert error.startswith("sale default/iphone-15: iphone_15: ")


def test_a_sale_that_cannot_be_read_does_not_hide_the_others(
    ctl: Ctl, tmp_path: Path, environ: dict[str, str]
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(SAMPLE.read_text().replace("iphone-15", "other").replace("iphone_15", "other"))
    ctl("apply", "-f", str(SAMPLE), "-f", str(other))
    with Redis.from_url(environ["FLASHSALE_REDIS_URL"]) as redis:
        redis.hset(ItemKeys.of("iphone_15").sale, "accepted", "many")
        redis.hset(ItemKeys.of("other").sale, "run_id", "fenced")
    unread = "flashsalectl: iphone_15: the sale cannot be read: "
    code, [_, *lines], [error] = ctl("get")
    assert code == 1
    assert [line.split()[:3] for line in lines] == [
        ["iphone_15", "default/iphone-15", "Unknown"],
        ["other", "default/other", "Fenced"],
    ]
    assert error.startswith(unread)
    for command in (["get"], ["describe"], ["rebuild"]):
        code, _, [error] = ctl(*command, "iphone_15")
        assert (code, error.startswith(unread)) == (1, True)
    code, _, [rebuilt, error] = ctl("rebuild", "--all")
    assert code == 1
    assert rebuilt.startswith("sale default/other stays fenced: Kafka is away")
    assert error.startswith(unread)


def test_a_delete_that_another_process_undoes_fails(
    ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator still serves its FlashSale, for example."""
    ctl("apply", "-f", str(SAMPLE))
    [spec] = parse(SAMPLE.read_text())
    close = Reconciler.close

    async def undone(own: Reconciler, sale_id: str) -> Result:
        closed = await close(own, sale_id)
        await own.reconcile(spec)
        return closed

    monkeypatch.setattr(Reconciler, "close", undone)
    why = "its manifest was applied again at the same time"
    assert ctl("delete", "iphone_15") == (1, [], [f"sale default/iphone-15 is open: {why}"])


async def test_one_failure_of_many_is_returned_and_one_of_all_is_raised() -> None:
    async def call(number: int) -> int:
        await asyncio.sleep(0)
        if number % 10:
            raise LedgerUnavailable(f"away {number % 10}")
        return number

    first, second, *_ = results = await for_each(range(1000), call)
    assert (first, str(second)) == (0, "away 1")
    assert [result for result in results if isinstance(result, int)] == [*range(0, 1000, 10)]
    assert [str(each) for each in await for_each([1, 2], call)] == ["away 1", "away 2"]
    with pytest.raises(LedgerUnavailable, match="away 1"):
        await for_each([1, 11, 21], call)
    assert await for_each([], call) == []


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


@pytest.mark.parametrize("name", ["", "a.yaml,", ",a.yaml"])
def test_an_empty_name_of_a_file_is_not_the_current_folder(
    ctl: Ctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "a.yaml").write_text(SAMPLE.read_text())
    (tmp_path / "other.yaml").write_text(SAMPLE.read_text().replace("iphone", "other"))
    monkeypatch.chdir(tmp_path)
    error = "flashsalectl: -f: the name of a file is empty"
    assert ctl("apply", "-f", name) == (1, [], [error])


def test_an_export_without_sales_is_a_mistake(ctl: Ctl, tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text("apiVersion: v1\nkind: List\nitems: []\n")
    error = f"flashsalectl: {file}: contains no FlashSale"
    assert ctl("apply", "-f", str(file)) == (1, [], [error])


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


def test_a_command_that_reads_refuses_the_servers_of_another_engine(
    ctl: Ctl, environ: dict[str, str]
) -> None:
    """Otherwise each sale would seem lost, and the next step a rebuild."""
    ctl("apply", "-f", str(SAMPLE))
    elsewhere = environ["FLASHSALE_REDIS_URL"].rpartition("/")[0] + "/1"
    for changes, message in (
        ({"FLASHSALE_ENGINE": "brand"}, "the ledger belongs to the engine flashsale, but "),
        ({"FLASHSALE_REDIS_URL": elsewhere}, "the sales are in the Redis at 127.0.0.1:"),
    ):
        for command in (["get"], ["describe", "iphone_15"], ["audit"]):
            code, lines, [error] = ctl(*command, **changes)
            assert (code, lines) == (1, [])
            assert error.startswith(f"flashsalectl: {message}")
            assert "adopt-redis" not in error, "it would write the address of a port-forward"
        code, lines, _ = ctl("report", "iphone_15", **changes)
        assert code == 0
        [number] = [number for number, line in enumerate(lines) if line.endswith(": not audited")]
        assert lines[number + 1].startswith(f"  {message}")
    tunnel = environ["FLASHSALE_REDIS_URL"].replace("127.0.0.1", "localhost")
    assert ctl("get", FLASHSALE_REDIS_URL=tunnel)[0] == 0


def test_a_redis_that_evicts_keys_is_refused(ctl: Ctl, redis_server: RedisServer) -> None:
    redis = Redis.from_url(redis_server.url)
    redis.config_set("maxmemory-policy", "volatile-ttl")
    try:
        code, _, [error] = ctl("apply", "-f", str(SAMPLE))
    finally:
        redis.config_set("maxmemory-policy", "noeviction")
    assert code == 1
    assert error.startswith("flashsalectl: Redis has maxmemory-policy volatile-ttl, but needs")


@pytest.mark.parametrize("command", [["get"], ["audit"], ["delete", "iphone_15"]])
def test_a_database_without_tables_is_one_line_with_the_next_step(
    ctl: Ctl, other_database_url: str, command: list[str]
) -> None:
    error = "the ledger lacks migrations: start a consumer or the operator of this version"
    assert ctl(*command, FLASHSALE_DATABASE_URL=other_database_url) == (
        1,
        [],
        [f"flashsalectl: {error}"],
    )


@pytest.mark.parametrize(
    "command",
    [
        ["get"],
        ["describe", "iphone_15"],
        ["audit"],
        ["report", "iphone_15"],
        ["reservations", "iphone_15"],
        ["apply", "-f", str(SAMPLE)],
        ["close", "iphone_15"],
        ["delete", "iphone_15"],
        ["rebuild", "--all"],
        ["confirm", "iphone_15", str(uuid.uuid4()), "--order-ref", "order-7"],
        ["cancel", "iphone_15", str(uuid.uuid4())],
        ["adopt-redis"],
    ],
    ids=lambda command: command[0],
)
def test_a_ledger_of_an_earlier_version_is_refused_and_not_migrated(
    ctl: Ctl, other_database_url: str, command: list[str]
) -> None:
    """Consumers of that version could not use a migrated one."""

    async def prepare() -> None:
        pool = await ledger.connect(other_database_url)
        await migrate_to(pool, 7)
        await pool.close()

    asyncio.run(prepare())
    error = (
        "flashsalectl: the ledger is of an earlier version: start a consumer of this version, or "
        "use the flashsalectl of that version"
    )
    for each in (command, ["get"]):
        assert ctl(*each, FLASHSALE_DATABASE_URL=other_database_url) == (1, [], [error])


def test_a_ledger_of_a_newer_version_is_refused_only_where_it_cannot_be_read(
    ctl: Ctl, within: Within
) -> None:
    ctl("apply", "-f", str(SAMPLE))

    async def add_a_version(shop: SimulatedShop) -> None:
        await shop.pool.execute("INSERT INTO flashsale_migrations VALUES (9999)")

    within(add_a_version)
    assert ctl("get")[0] == ctl("apply", "-f", str(SAMPLE))[0] == 0

    async def rename_a_column(shop: SimulatedShop) -> None:
        await shop.pool.execute("ALTER TABLE reservations RENAME accepted_at TO reserved_at")

    within(rename_a_column)
    error = "the ledger is of a newer version: use the flashsalectl of that version"
    refused: object = (1, [], [f"flashsalectl: {error}"])
    assert ctl("get")[0] == 0
    assert ctl("reservations", "iphone_15") == refused

    async def rename_another(shop: SimulatedShop) -> None:
        await shop.pool.execute("ALTER TABLE sales RENAME closed_at TO ended_at")

    within(rename_another)
    assert ctl("get") == ctl("describe", "iphone_15") == ctl("close", "iphone_15") == refused


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


@pytest.mark.parametrize(
    "command", ["get", "describe", "audit", "rebuild", "close", "delete", "republish", "report a"]
)
def test_an_empty_item_does_not_mean_all_items(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run([*command.split(), ""], {}) == 2
    assert "must not be empty" in capsys.readouterr().err


@pytest.mark.parametrize("wanted", ["iphone-15", "default/iphone-15", "Iphone15", "iphone_16"])
@pytest.mark.parametrize("command", ["get", "describe", "close", "delete", "reservations"])
def test_an_unknown_item_gets_the_nearest_item(ctl: Ctl, command: str, wanted: str) -> None:
    ctl("apply", "-f", str(SAMPLE))
    assert ctl(command, wanted) == (
        1,
        [],
        [f"flashsalectl: {wanted}: there is no sale of this item; did you mean iphone_15?"],
    )


@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "command",
    [
        "size --buyers 9 --stock 9",
        "--help",
        pytest.param("completion bash", marks=pytest.mark.slow),
        pytest.param("--version", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("redirection", "message"),
    [
        (">/dev/full", "the output cannot be written: No space left on device"),
        (">&-", "the output cannot be written: it is closed"),
        ("1</dev/null", "the output cannot be written: Bad file descriptor"),
        ("| true", ""),
    ],
)
def test_output_that_cannot_be_written_is_at_most_one_line(
    command: str, redirection: str, message: str, unbuffered: str
) -> None:
    done = _in_a_shell(f"{command} {redirection}", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    assert done.stderr == (message and f"flashsalectl: {message}\n")


def test_a_closed_input_is_one_line() -> None:
    done = _in_a_shell("apply -f - <&-")
    assert done.returncode == 1
    assert done.stderr == "flashsalectl: standard input: cannot be read: it is closed\n"


def _in_a_shell(command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command line with redirections. A pipe has the exit code of its first program."""
    program = Path(sys.executable).with_name("flashsalectl")
    return subprocess.run(
        ["bash", "-c", f'{program} {command}; exit "${{PIPESTATUS[0]}}"'],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=False,
    )
