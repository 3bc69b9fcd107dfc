"""Logging: JSON in a container and plain lines on a terminal, without passwords or floods."""

import logging
import re
import socket
import ssl
import sys
from dataclasses import dataclass
from typing import Annotated, Final, Literal, TextIO

from msgspec import Meta
from pythonjsonlogger.core import RESERVED_ATTRS, merge_record_extra
from pythonjsonlogger.msgspec import MsgspecFormatter

from flashsale.errors import has_just_closed

LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"],
    Meta(description="debug, info, warning or error"),
]

BURST: Final = 10
WINDOW_SECONDS: Final = 10.0
"""A log statement emits at most `BURST` lines per window of this length."""

# uvicorn adds the message again as `color_message`.
_NO_FIELDS: Final = (*RESERVED_ATTRS, "color_message")
_JSON: Final = MsgspecFormatter(
    ("levelname", "name", "message"),
    rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
    reserved_attrs=_NO_FIELDS,
    timestamp="time",
)
_TEXT: Final = "%(asctime)s %(levelname)s %(name)s %(message)s"
_MAX_STATEMENTS: Final = 1_000
_PASSWORD: Final = re.compile(r"(://[^\s/@:\"]*:)[^\s/@\"]+@")


def configure(level: LogLevel = "info", stream: TextIO | None = None) -> None:
    """Sends all log lines to `stream`, by default stderr.

    Only the engine's own loggers emit debug lines. Client libraries would log the bytes that they
    send, including passwords.
    """
    stream = stream or sys.stderr
    handler = _Handler(stream)
    handler.setFormatter(_Terminal(_TEXT) if stream.isatty() else _JSON)
    handler.addFilter(_without_debug_of_libraries)
    handler.addFilter(_is_not_abandoned)
    handler.addFilter(Repeats())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # aiokafka logs every retry during an outage. Its callers log each change once.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL + 1)


def _without_debug_of_libraries(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.INFO or record.name.startswith("flashsale")


def _is_not_abandoned(record: logging.LogRecord) -> bool:
    """Returns False for an error of a connection that no client uses any more.

    uvloop goes on with the look-up or the TLS handshake of a client that has given up, and still
    reads from a TLS connection after it has closed. asyncio logs the errors with a traceback.
    """
    error = record.exc_info and record.exc_info[1]
    return record.name != "asyncio" or not (
        isinstance(error, (socket.gaierror, ssl.SSLError)) or has_just_closed(error)
    )


@dataclass(slots=True)
class _Window:
    began: float
    lines: int = 1


class Repeats(logging.Filter):
    """Limits each log statement to `BURST` lines per window. Reports the number suppressed."""

    def __init__(self) -> None:
        super().__init__()
        self._windows: dict[tuple[str, str], _Window] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        statement = (record.name, str(record.msg))
        window = self._windows.get(statement)
        # After a step back of the clock, a window that began later has ended.
        if window is not None and 0 <= record.created - window.began < WINDOW_SECONDS:
            window.lines += 1
            return window.lines <= BURST
        if len(self._windows) >= _MAX_STATEMENTS:
            self._windows.clear()
        self._windows[statement] = _Window(record.created)
        suppressed = window.lines - BURST if window is not None else 0
        if suppressed > 0:
            record.msg = f"{record.getMessage()} ({suppressed} similar lines suppressed)"
            record.args = ()
        return True


class _Handler(logging.StreamHandler[TextIO]):
    def format(self, record: logging.LogRecord) -> str:
        """Returns the line without passwords."""
        return _PASSWORD.sub(r"\1***@", super().format(record))


class _Terminal(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        fields = merge_record_extra(record, {}, reserved=_NO_FIELDS)
        own = [f"{name}={value}" for name, value in fields.items()]
        return " ".join([super().formatMessage(record), *own])
