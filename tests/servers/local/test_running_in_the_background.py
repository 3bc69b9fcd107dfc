"""`make up`, `make down` and `make clean`, on servers in a folder of the test."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev import local
from dev.stack.ports import free_port
from tests.support.paths import DOCS, ROOT

pytestmark = pytest.mark.slow

# Runs a command of dev.local with another folder for the data, and another mark.
RUN = """
import sys
from pathlib import Path
from dev import local
from dev.progress import ending_quietly
local.LOCAL = local.ROOT = Path(sys.argv.pop(1))
local.LOCAL, local._ENV = local.ROOT / ".local", local.ROOT / ".local" / "env"
sys.exit(ending_quietly(local.main))
"""


class Checkout:
    """A folder that stands for a checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()

    def run(self, *arguments: str, **changes: str) -> "subprocess.CompletedProcess[str]":
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FLASHSALE_")}
        return subprocess.run(
            [sys.executable, "-c", RUN, str(self.folder), *arguments],
            cwd=ROOT,
            env=environment | changes,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    def up(self, **changes: str) -> "subprocess.CompletedProcess[str]":
        return self.run("up", "--port", str(self.port), **changes)

    def variables(self) -> dict[str, str]:
        lines = (self.folder / ".local" / "env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def flashsalectl(self, *arguments: str) -> str:
        return subprocess.run(
            [Path(sys.executable).with_name("flashsalectl"), *arguments],
            cwd=ROOT,
            env=os.environ | self.variables(),
            capture_output=True,
            text=True,
            check=True,
        ).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    made = Checkout(tmp_path / "checkout")
    made.folder.mkdir()
    yield made
    made.run("clean")


def test_a_foreign_server_on_the_port_is_named(checkout: Checkout) -> None:
    with socket.socket() as foreign:
        foreign.bind(("127.0.0.1", checkout.port))
        foreign.listen()
        done = checkout.up()
    assert done.returncode == 1
    assert f"process {os.getpid()} " in done.stderr
    assert f"listens on port {checkout.port}" in done.stderr
    assert "make up PORT=" in done.stderr
    assert checkout.run("down").stdout == "Nothing is running.\n"


def test_every_sale_continues_after_down_and_up(checkout: Checkout) -> None:
    assert checkout.up(http_proxy="http://127.0.0.1:9").returncode == 0
    restocked = checkout.folder / "iphone-15.yaml"
    restocked.write_text(local.SAMPLE.read_text().replace("stock: 100", "stock: 150"))
    checkout.flashsalectl("apply", "-f", str(restocked))
    metrics = f"http://127.0.0.1:{checkout.port + 1010}/metrics"
    again = checkout.up()
    assert (again.returncode, again.stdout.count("already running")) == (0, 5)
    assert metrics in again.stdout
    assert f"on http://localhost:{checkout.port}/ in a browser" in again.stdout
    assert checkout.run("down").stdout.endswith("Stopped. The data stays in .local.\n")

    assert checkout.up().returncode == 0
    sales = json.loads(checkout.flashsalectl("get", "-o", "json"))
    assert [(sale["state"], sale["allocated"]) for sale in sales] == [
        ("Selling", 12_000),
        ("Selling", 150),
    ]
    checkout.flashsalectl("delete", "concert-2027-03-14")
    assert "concert-2027-03-14" not in checkout.flashsalectl("get")
    assert "concert-2027-03-14" in checkout.flashsalectl("get", "--all")

    shutil.move(checkout.folder / ".local", checkout.folder / "moved")
    refused = checkout.up()
    assert refused.returncode == 1
    assert "`make down` stops them" in refused.stderr
    running = set(re.findall(r"\b\d+\b", refused.stderr))
    stopped = re.findall(r"process (\d+), which .local does not name", checkout.run("down").stdout)
    assert len(running) >= 4  # Kafka may have ended, as its folder moved
    assert running.issuperset(stopped)
    assert checkout.run("down").stdout == "Nothing is running.\n"


def test_servers_that_the_environment_names_must_answer_and_be_those_of_the_running_engine(
    checkout: Checkout,
) -> None:
    assert checkout.up().returncode == 0
    variables = checkout.variables()
    addresses = {name: variables[name] for name in local.ADDRESSES}
    nowhere = "postgresql://u:secret@127.0.0.1:1/x"
    refused = checkout.up(FLASHSALE_DATABASE_URL=nowhere)
    assert refused.returncode == 1
    assert "`unset FLASHSALE_DATABASE_URL`" in refused.stderr
    assert len(refused.stderr.splitlines()) == 2
    assert checkout.variables() == variables
    again = checkout.up(**addresses)
    assert (again.returncode, again.stdout.count("already running")) == (0, 5)
    checkout.run("down")

    refused = checkout.up(FLASHSALE_DATABASE_URL=nowhere)
    assert refused.returncode == 1
    assert "PostgreSQL: " in refused.stderr
    assert "secret" not in refused.stderr
    assert checkout.variables() == variables
    checkout.run("clean")

    # A shell that has read .local/env before.
    refused = checkout.up(**addresses)
    assert refused.returncode == 1
    assert f"`unset {' '.join(addresses)}`" in refused.stderr
    assert "consumer" not in refused.stdout
    assert checkout.run("down").stdout == "Nothing is running.\n"


def test_the_documented_commands_make_a_paid_order(checkout: Checkout) -> None:
    (block,) = {
        found
        for page in (ROOT / "README.md", DOCS / "getting-started.md")
        for found in re.findall(r"```\n(make up\nID=.*?)```", page.read_text(), re.DOTALL)
    }
    first, *commands = block.splitlines()
    assert (first, len(commands)) == ("make up", 2)
    assert checkout.up().returncode == 0
    script = "\n".join(commands).replace(":8080", f":{checkout.port}")
    script = script.replace(".venv/bin", str(Path(sys.executable).parent))
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=ROOT,
        env=os.environ | checkout.variables(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [order] = json.loads(checkout.flashsalectl("reservations", "concert-2027-03-14", "-o", "json"))
    assert (order["state"], order["orderRef"]) == ("confirmed", "order-1001")


def test_a_file_in_the_place_of_the_data_is_named(checkout: Checkout) -> None:
    data = checkout.folder / ".local"
    data.touch()
    for done in (checkout.up(), checkout.run("clean")):
        assert done.returncode == 1
        assert done.stderr.startswith(f"\n{data}: ")
        assert done.stderr.endswith("a folder that you can write, or remove it\n")
        assert len(done.stderr.splitlines()) == 2
    data.unlink()


def test_a_wrong_setting_is_the_first_line_of_the_error(checkout: Checkout) -> None:
    done = checkout.up(FLASHSALE_LOG_LEVEL="loud")
    assert done.returncode == 1
    log = done.stderr.partition("Its log of this start:\n")[2]
    assert "FLASHSALE_LOG_LEVEL" in log.splitlines()[0]
    assert "Traceback" not in done.stderr


def test_an_interrupted_start_stops_what_it_has_started(checkout: Checkout) -> None:
    starting = subprocess.Popen(
        [sys.executable, "-c", RUN, str(checkout.folder), "up", "--port", str(checkout.port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert starting.stdout is not None
    while "kafka" not in starting.stdout.readline():
        assert starting.poll() is None
    starting.send_signal(signal.SIGINT)
    _, errors = starting.communicate(timeout=60)
    assert starting.returncode == 130
    assert "Traceback" not in errors
    assert checkout.run("down").stdout == "Nothing is running.\n"


def test_a_closed_pipe_ends_quietly(checkout: Checkout) -> None:
    done = subprocess.run(
        ["bash", "-c", '"$@" | true; exit "${PIPESTATUS[0]}"', "-", sys.executable, "-c", RUN,
         str(checkout.folder), "up", "--port", str(checkout.port)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )  # fmt: skip
    assert done.returncode == 141
    assert done.stderr == ""
    assert checkout.run("down").stdout == "Nothing is running.\n"
