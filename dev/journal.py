"""The crowd's own record of every answer it got.

The reservations in a journal are checked against the ledger. The engine's own account of them plays
no part in that check.
"""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request that a buyer wants to make. An empty `request_key` sends no Idempotency-Key.

    An empty `token` sends no token.
    """

    user_id: str
    body: dict[str, object]
    request_key: str = ""
    token: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One answer. `status` 0 means that the connection broke before an answer came.

    `received_at` is in Unix seconds. `seconds` counts from sending to the end of the answer.
    """

    attempt: Attempt
    status: int
    answer: dict[str, object]
    received_at: float
    seconds: float

    @property
    def outcome(self) -> str:
        """`202`, `no answer`, or the last part of the problem's type."""
        if self.status in (0, 202):
            return "202" if self.status else "no answer"
        return str(self.answer.get("type", self.status)).rpartition(":")[2]


@dataclass(slots=True)
class Journal:
    """Every answer, in the order of arrival."""

    entries: list[Entry] = field(default_factory=list)

    def outcomes(self) -> Counter[tuple[int, str]]:
        """Count answers by status and outcome. Repeats of a reservation count as `replayed`."""
        seen: set[object] = set()
        counts: Counter[tuple[int, str]] = Counter()
        for entry in self.entries:
            outcome = entry.outcome
            if entry.status == 202:
                identity = entry.answer["reservationId"]
                outcome = "replayed" if identity in seen else "accepted"
                seen.add(identity)
            counts[entry.status, outcome] += 1
        return counts

    def accepted(self) -> dict[str, Entry]:
        """Return the first 202 of each reservation, by reservation id."""
        first: dict[str, Entry] = {}
        for entry in self.entries:
            if entry.status == 202:
                first.setdefault(str(entry.answer["reservationId"]), entry)
        return first

    def broken_keys(self) -> list[tuple[str, str]]:
        """Return the (user, key) pairs that got more than one reservation."""
        given: dict[tuple[str, str], set[object]] = {}
        for entry in self.entries:
            if entry.status == 202 and entry.attempt.request_key:
                pair = (entry.attempt.user_id, entry.attempt.request_key)
                given.setdefault(pair, set()).add(entry.answer["reservationId"])
        return [pair for pair, identities in given.items() if len(identities) > 1]
