"""What a process logs: JSON for machines, lines for people, no password, no flood."""

import io
import json
import logging
from collections.abc import Iterator
from datetime import datetime

import pytest

from flashsale import logs

log = logging.getLogger("flashsale.test")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("aiokafka").setLevel(logging.NOTSET)


def test_a_container_logs_json() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream)
    log.info("sold %d of “%s”", 3, "phone", extra={"trace_id": "4bf92f3577b34da6a3ce929d0e0e4736"})
    line = json.loads(stream.getvalue())
    assert datetime.fromisoformat(line.pop("time")).utcoffset() is not None
    assert line == {
        "level": "INFO",
        "logger": "flashsale.test",
        "message": "sold 3 of “phone”",
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
    }


def test_a_traceback_stays_in_its_line() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream)
    try:
        raise ValueError("no such thing")  # noqa: TRY301 - for its traceback
    except ValueError:
        log.exception("it failed")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["message"] == "it failed"
    assert json.loads(line)["exception"].endswith("ValueError: no such thing")


def test_a_terminal_is_shown_lines() -> None:
    stream = Terminal()
    logs.configure(stream=stream)
    log.warning("waiting for %s", "Kafka", extra={"trace_id": "4bf9"})
    assert stream.getvalue().endswith(" WARNING flashsale.test waiting for Kafka trace_id=4bf9\n")


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_password_in_an_address_is_not_logged(kind: type[io.StringIO]) -> None:
    stream = kind()
    logs.configure(stream=stream)
    log.error("no answer from postgresql://shop:s3cr3t%s@db:5432/flashsale", "!")
    try:
        raise OSError("redis://:s3cr3t@redis:6379/0 is away")  # noqa: TRY301 - for its traceback
    except OSError:
        log.exception("it failed")
    assert "s3cr3t" not in stream.getvalue()
    assert "postgresql://shop:***@db:5432/flashsale" in stream.getvalue()


def test_debug_is_for_our_own_modules() -> None:
    stream = io.StringIO()
    logs.configure("debug", stream)
    log.debug("ours")
    logging.getLogger("flashsale_api.app").debug("ours too")
    logging.getLogger("urllib3").debug("somebody's headers")
    assert "ours" in stream.getvalue()
    assert "ours too" in stream.getvalue()
    assert "headers" not in stream.getvalue()


def test_a_level_leaves_out_what_is_below() -> None:
    stream = io.StringIO()
    logs.configure("error", stream)
    log.warning("not this")
    logging.getLogger("uvicorn").warning("nor this")
    log.error("but this")
    assert stream.getvalue().count("\n") == 1


def at(seconds: float, message: str, *arguments: object) -> logging.LogRecord:
    record = logging.LogRecord("flashsale", logging.WARNING, "", 0, message, arguments, None)
    record.created = seconds
    return record


def test_a_statement_that_is_logged_again_and_again_is_cut_short_and_says_so() -> None:
    repeats = logs.Repeats()
    kept = [repeats.filter(at(0.01 * n, "try %d failed", n)) for n in range(50)]
    assert kept == [True] * 10 + [False] * 40
    assert repeats.filter(at(1, "something else"))
    later = at(10.5, "try %d failed", 50)
    assert repeats.filter(later)
    assert later.getMessage() == "try 50 failed (40 more like it were left out)"


def test_statements_that_are_never_the_same_do_not_fill_the_memory() -> None:
    repeats = logs.Repeats()
    assert all(repeats.filter(at(0, f"message {n}")) for n in range(5_000))
    assert len(repeats._windows) <= 1_000
