"""Tracks whether a server is up. Logs one line when it goes away and one when it is back."""

import logging
from typing import Final

from prometheus_client import Gauge

log = logging.getLogger(__name__)

FIRST_DELAY_SECONDS: Final = 0.2
LAST_DELAY_SECONDS: Final = 5.0


class Availability:
    """The state of one server, and the delay until the next attempt to reach it."""

    def __init__(self, server: str, up: Gauge, *, there: bool | None = None) -> None:
        """`there` is the state to assume before the first call. None means unknown."""
        self._server = server
        self._up = up
        self._there = there
        self._delay_seconds = FIRST_DELAY_SECONDS
        self.problem = ""
        """Why the server is away, or nothing."""
        up.set(there or 0)

    def away(self, error: Exception) -> None:
        """Notes that a call failed."""
        self.problem = f"waiting for {self._server}: {str(error) or type(error).__name__}"
        if self._there is not False:
            log.warning("%s", self.problem)
        self._there = False
        self._up.set(0)

    def back(self) -> None:
        """Notes that a call succeeded."""
        if not self._there:
            log.info("%s is %s", self._server, "there" if self._there is None else "back")
        self._there = True
        self.problem = ""
        self._delay_seconds = FIRST_DELAY_SECONDS
        self._up.set(1)

    def delay(self) -> float:
        """Returns the seconds to wait before the next attempt: from 0.2 to 5, doubled each time."""
        delay = self._delay_seconds
        self._delay_seconds = min(2 * delay, LAST_DELAY_SECONDS)
        return delay
