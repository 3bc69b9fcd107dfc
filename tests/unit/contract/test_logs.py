"""Log lines: JSON in containers, text on terminals, no passwords, no floods."""

import asyncio
import gc
import io
import json
import logging
import socket
import ssl
from collections.abc import Iterator
from datetime import datetime

import pytest
import uvloop

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


def test_a_traceback_is_part_of_its_json_line() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream)
    try:
        raise ValueError("bad value")  # noqa: TRY301 - for its traceback
    except ValueError:
        log.exception("it failed")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["message"] == "it failed"
    assert json.loads(line)["exception"].endswith("ValueError: bad value")


def test_a_terminal_gets_text_lines() -> None:
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


def test_libraries_log_no_debug_lines() -> None:
    stream = io.StringIO()
    logs.configure("debug", stream)
    log.debug("ours")
    logging.getLogger("flashsale_api.app").debug("ours too")
    logging.getLogger("urllib3").debug("request headers")
    assert "ours" in stream.getvalue()
    assert "ours too" in stream.getvalue()
    assert "headers" not in stream.getvalue()


@pytest.mark.parametrize(
    "error",
    [
        socket.gaierror("unknown host"),
        ssl.SSLCertVerificationError("refused"),
        RuntimeError("unable to perform operation on <TCPTransport>; the handler is closed"),
    ],
)
def test_errors_of_abandoned_connections_are_not_logged(error: Exception) -> None:
    """uvloop leaves them to asyncio, which logs them if no task waits for the connection."""
    stream = io.StringIO()
    logs.configure(stream=stream)

    async def abandon() -> None:
        asyncio.get_running_loop().create_future().set_exception(error)
        gc.collect()

    uvloop.run(abandon())
    assert stream.getvalue() == ""


def test_lines_below_the_level_are_not_logged() -> None:
    stream = io.StringIO()
    logs.configure("error", stream)
    log.warning("hidden")
    logging.getLogger("uvicorn").warning("hidden too")
    log.error("shown")
    assert stream.getvalue().count("\n") == 1


def at(seconds: float, message: str, *arguments: object) -> logging.LogRecord:
    record = logging.LogRecord("flashsale", logging.WARNING, "", 0, message, arguments, None)
    record.created = seconds
    return record


def test_repeated_lines_are_suppressed_and_their_number_is_reported() -> None:
    repeats = logs.Repeats()
    kept = [repeats.filter(at(0.01 * n, "try %d failed", n)) for n in range(50)]
    assert kept == [True] * 10 + [False] * 40
    assert repeats.filter(at(1, "something else"))
    later = at(10.5, "try %d failed", 50)
    assert repeats.filter(later)
    assert later.getMessage() == "try 50 failed (40 similar lines suppressed)"


def test_a_clock_that_is_set_back_silences_no_statement() -> None:
    repeats = logs.Repeats()
    assert [repeats.filter(at(7_200, "refused")) for _ in range(11)] == [True] * 10 + [False]
    assert repeats.filter(at(3_600, "refused"))
    assert repeats.filter(at(3_611, "refused"))


def test_the_memory_for_different_statements_is_bounded() -> None:
    repeats = logs.Repeats()
    assert all(repeats.filter(at(0, f"message {n}")) for n in range(5_000))
    assert len(repeats._windows) <= 1_000
