"""The thresholds of the k6 scripts fail if the engine breaks a rule.

A stand-in for the engine gives the wrong answers.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

K6 = Path(sys.executable).with_name("k6")
STOCK = 10

Answer = Callable[[int, dict[str, object]], tuple[int, dict[str, object]]]


def accepted(number: int, body: dict[str, object]) -> tuple[int, dict[str, object]]:
    return 202, {"reservationId": f"id-{number}", "state": "confirmed", **body}


def refused(kind: str, status: int = 409) -> tuple[int, dict[str, object]]:
    return status, {"type": f"urn:flashsale:problem:{kind}", "status": status}


def sells(units: int, then: str = "sold-out") -> Answer:
    return lambda number, body: accepted(number, body) if number < units else refused(then)


class Engine(ThreadingHTTPServer):
    """A server that answers the nth POST with `answer`. A GET shows the stock."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Answer = sells(STOCK)
        self.numbers = count()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Engine

    def do_GET(self) -> None:
        self._send(200, {"available": STOCK})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(*self.server.answer(next(self.server.numbers), body))

    def _send(self, status: int, answer: dict[str, object]) -> None:
        content = json.dumps(answer).encode()
        kind = "application/json" if status < 300 else "application/problem+json"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if status == 202:
            location = f"/sales/{answer['itemId']}/reservations/{answer['reservationId']}"
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its parent's name
        """Keep stderr free of access logs."""


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(engine: Engine, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    flags = ("--no-usage-report", "--quiet", "--log-format", "raw")
    return subprocess.run(
        [K6, "run", *flags, ROOT / "loadtest" / script],
        env={
            **os.environ,
            "API_URL": f"http://127.0.0.1:{engine.server_port}",
            "ITEM_ID": "item",
            "STOCK": str(STOCK),
            "RATE": "20",
            "DURATION": "1s",
            "VUS": "20",
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_run_that_sells_exactly_the_stock_passes_and_prints_its_journal(engine: Engine) -> None:
    done = run(engine, "stampede.js")

    assert done.returncode == 0, done.stdout
    journal = [json.loads(line) for line in done.stderr.splitlines()]
    assert {entry["reservationId"] for entry in journal} == {f"id-{n}" for n in range(STOCK)}
    assert all(set(e) == {"reservationId", "userId", "itemId", "key"} for e in journal)


@pytest.mark.parametrize(
    ("answer", "broken"),
    [
        (sells(STOCK + 1), "units_accepted"),
        (sells(STOCK - 1), "units_accepted"),
        (sells(STOCK, then="limit-reached"), "checks"),
        (lambda n, b: sells(STOCK)(n, b) if n else refused("fenced", 503), "answers_5xx"),
        (lambda n, b: sells(STOCK)(n, b | {"userId": "another"}), "checks"),
    ],
    ids=["oversold", "unsold", "wrong-refusal", "server-error", "wrong-user"],
)
def test_a_broken_rule_fails_the_run(engine: Engine, answer: Answer, broken: str) -> None:
    engine.answer = answer

    done = run(engine, "stampede.js")

    assert done.returncode == 99, done.stdout
    assert "crossed" in done.stderr
    assert broken in done.stderr


def test_two_reservations_for_one_order_fail_the_run(engine: Engine) -> None:
    engine.answer = sells(10**6)

    done = run(engine, "retry-storm.js")

    assert done.returncode == 99, done.stdout


def test_a_refused_buyer_fails_a_soak(engine: Engine) -> None:
    engine.answer = sells(STOCK // 2)

    done = run(engine, "soak.js", RATE=str(STOCK))

    assert done.returncode == 99, done.stdout
    assert "buyers_refused" in done.stderr


def test_a_closed_loop_that_sells_each_user_one_unit_passes(engine: Engine) -> None:
    buyers = set()

    def once(number: int, body: dict[str, object]) -> tuple[int, dict[str, object]]:
        if body["userId"] in buyers:
            return refused("limit-reached")
        buyers.add(body["userId"])
        return accepted(number, body)

    engine.answer = once

    done = run(engine, "closed-loop.js", VUS="5")

    assert done.returncode == 0, done.stdout
    assert buyers == {f"user_{number}" for number in range(1, 6)}


def test_a_second_unit_for_a_user_fails_a_closed_loop(engine: Engine) -> None:
    engine.answer = sells(6)

    done = run(engine, "closed-loop.js", VUS="5")

    assert done.returncode == 99, done.stdout
    assert "units_accepted" in done.stderr


def test_buyers_who_never_arrive_fail_the_run(engine: Engine) -> None:
    """All connections wait for slow answers, so k6 sends fewer requests than the rate says."""
    sells_stock = engine.answer

    def slow(number: int, body: dict[str, object]) -> tuple[int, dict[str, object]]:
        time.sleep(1)
        return sells_stock(number, body)

    engine.answer = slow

    done = run(engine, "stampede.js", VUS="5", MAX_VUS="5", DURATION="3s")

    assert done.returncode == 99, done.stdout
    assert "dropped_iterations" in done.stderr


def options(script: str, **variables: str) -> dict[str, Any]:
    """Return the options that k6 takes from a script."""
    done = subprocess.run(
        [K6, "inspect", "--include-system-env-vars", ROOT / "loadtest" / script],
        env={**os.environ, "ITEM_ID": "item", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_checkout_waits_for_the_second_look_of_its_last_buyer() -> None:
    """Otherwise k6 ends all buyers before the check that a confirmed reservation stays."""
    scenarios = options("checkout.js", HOLD="10m", ORDER_TOKEN="x")["scenarios"]
    for name in ("checkout", "rest"):
        stop = re.fullmatch(r"(?:(\d+)m)?(\d+)s", scenarios[name]["gracefulStop"] or "30s")
        assert stop is not None
        assert 60 * int(stop[1] or 0) + int(stop[2]) > 600 + 30  # a hold and its grace


def test_all_copies_of_a_retry_storm_are_parallel() -> None:
    found = options("retry-storm.js", COPIES="50")
    assert (found["batch"], found["batchPerHost"]) == (50, 50)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("P95_MS", "quick", "an integer from 1 to 100000000"),
        ("STOCK", "9" * 23, "an integer from 1 to 100000000"),
        ("DURATION", "9999999999h", "a duration such as 90s, 5m or 1h up to 1000h"),
        ("DURATION", "1d", "a duration such as 90s, 5m or 1h up to 1000h"),
    ],
)
def test_an_invalid_setting_is_named(engine: Engine, name: str, value: str, rule: str) -> None:
    done = run(engine, "checkout.js", ORDER_TOKEN="x", **{name: value})

    assert done.returncode != 0
    assert f"{name} must be {rule}, not {value}" in done.stderr
