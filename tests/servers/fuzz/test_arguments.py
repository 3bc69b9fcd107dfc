"""Invalid command lines get exit code 2, the usage, and an error that names the argument."""

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from flashsale.settings import PREFIX, KafkaSettings
from flashsale_api.settings import Settings as ApiSettings
from flashsale_consumer.settings import Settings as ConsumerSettings
from flashsale_operator.settings import Settings as OperatorSettings
from tests.support.paths import ROOT

PROGRAMS = {
    "flashsalectl": (str(Path(sys.executable).with_name("flashsalectl")),),
    "order_service.py": (sys.executable, str(ROOT / "examples/order-service/order_service.py")),
    **{
        module: (sys.executable, "-m", module)
        for module in (
            "flashsale_api",
            "flashsale_consumer",
            "flashsale_operator",
            "tests.faults",
            "dev.stack",
            "dev.local",
            "dev.soak",
            "bench.recording",
            "tests.faults.table",
        )
    },
}

BAD = [
    ("flashsalectl", ["sell"], "No such command 'sell'"),
    ("flashsalectl", ["get", "--redis", "x"], "--redis"),
    ("flashsalectl", ["apply"], "Missing option '-f' / '--file'"),
    ("flashsalectl", ["apply", "-f"], "Option '-f' requires an argument"),
    ("flashsalectl", ["apply", "sale.yaml"], "Missing option '-f' / '--file'"),
    ("flashsalectl", ["apply", "-f", "x", "y"], "unexpected extra argument (y)"),
    ("flashsalectl", ["get", "a", "b"], "unexpected extra argument (b)"),
    ("flashsalectl", ["get", "--json"], "--json"),
    ("flashsalectl", ["close"], "Missing argument 'ITEM'"),
    ("flashsalectl", ["get", "--force", "a"], "--force"),
    ("flashsalectl", ["rebuild"], "Name one ITEM, or use --all"),
    ("flashsalectl", ["rebuild", "a", "b"], "unexpected extra argument (b)"),
    ("flashsalectl", ["audit", "-x"], "-x"),
    ("flashsale_api", ["--port", "80"], "--port"),
    ("flashsale_api", ["serve"], "serve"),
    ("flashsale_consumer", ["--sideways"], "--sideways"),
    ("flashsale_consumer", ["8081"], "8081"),
    ("flashsale_operator", ["run"], "run"),
    ("flashsale_operator", ["--namespace", "shop"], "--namespace"),
    ("order_service.py", [], "FLASHSALE_ORDER_TOKENS must be a token of the order port"),
    ("order_service.py", ["--decline-rate", "some"], "--decline-rate"),
    ("order_service.py", ["--decline-rate", "nan"], "--decline-rate must be a number from 0 to 1"),
    ("order_service.py", ["--kafka", "broker"], "--kafka must be HOST:PORT"),
    ("bench.recording", ["wat"], "unrecognized arguments: wat"),
    ("tests.faults.table", ["wat"], "wat: no such file"),
    ("tests.faults", ["-n", "many"], "-n"),
    ("tests.faults", ["-n", "0"], "-n: must be at least 1"),
    ("tests.faults", ["--first", "1.5"], "--first"),
    ("tests.faults", ["--workers", "0"], "--workers: must be at least 1"),
    ("tests.faults", ["--redis", "two"], "--redis"),
    ("dev.stack", ["sing"], "'sing'"),
    ("dev.soak", ["--minutes", "0"], "--minutes: must be a number above 0, not 0"),
    ("dev.soak", ["--rate", "many"], "--rate: must be a number above 0, not many"),
    ("dev.local", [], "required"),
    ("dev.local", ["sideways"], "'sideways'"),
    ("dev.local", ["up", "--port", "64526"], "--port: must be a number from 1 to 64525"),
    ("dev.local", ["up", "--port", "web"], "--port: must be a number from 1 to 64525"),
]


@pytest.mark.parametrize(("program", "arguments", "named"), BAD, ids=str)
def test_an_invalid_argument_is_named(program: str, arguments: list[str], named: str) -> None:
    done = run(program, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.lower().startswith(("usage: ", "error: option "))
    assert named in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_every_program_has_help(program: str) -> None:
    done = run(program, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.lower().startswith("usage: ")


@pytest.mark.parametrize("kind", [ApiSettings, ConsumerSettings, OperatorSettings])
def test_the_help_of_a_process_lists_exactly_its_settings(kind: type[KafkaSettings]) -> None:
    program = kind.__module__.partition(".")[0]
    fields = {PREFIX + field.name.upper() for field in msgspec.structs.fields(kind)}
    listed = re.findall(r"^ +(FLASHSALE_\w+)", run(program, "--help").stdout, re.MULTILINE)
    assert set(listed) == fields


@pytest.mark.parametrize("item", [" ", "*", "../..", "a\nb", "\udcff", "x" * 5_000, "{a}"])
def test_an_impossible_item_id_gives_a_one_line_error(item: str) -> None:
    """The error is about the item, or about the servers, which do not run."""
    for command in ("get", "close", "rebuild", "audit"):
        done = run("flashsalectl", command, item)
        assert done.returncode == 1, done
        assert done.stderr.startswith("flashsalectl: ")
        assert "Traceback" not in done.stderr


def run(program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    own = {name: value for name, value in os.environ.items() if not name.startswith("FLASHSALE_")}
    nowhere = {
        "FLASHSALE_REDIS_URL": "redis://127.0.0.1:1/0",
        "FLASHSALE_KAFKA_BOOTSTRAP": "127.0.0.1:1",
        "FLASHSALE_DATABASE_URL": "postgresql://u:p@127.0.0.1:1/db",
    }
    return subprocess.run(
        [*PROGRAMS[program], *arguments],
        env=own | nowhere,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
