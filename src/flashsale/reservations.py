"""The values that Redis takes and returns: requests, outcomes, records, outbox entries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from flashsale.errors import ContractViolation

BATCH_LIMIT: Final = 128
"""Requests in one `reserve` call. Such a call blocks Redis for at most about 2 ms."""


class Outcome(StrEnum):
    """Outcomes of a request in `reserve.lua`, with the script's own words."""

    ACCEPTED = "accepted"
    REPLAYED = "replayed"
    KEY_REUSED = "key_reused"
    ENDED = "ended"
    PAUSED = "paused"
    NOT_OPEN = "not_open"
    LIMIT_REACHED = "limit_reached"
    SOLD_OUT = "sold_out"
    NOT_ENOUGH_LEFT = "not_enough_left"
    OUTBOX_FULL = "outbox_full"
    UNKNOWN = "unknown"
    UNSUPPORTED = "unsupported"
    FENCED = "fenced"
    OTHER_ENGINE = "other_engine"


class Request(NamedTuple):
    """A request of a batch. Its fields satisfy `fields.py`. The last two may be empty."""

    reservation_id: str
    user_id: str
    quantity: int
    request_key: str = ""
    traceparent: str = ""


class Record(NamedTuple):
    """A reservation as stored in Redis. `occurred_ms` is Redis' clock in Unix milliseconds."""

    state: str
    version: int
    quantity: int
    occurred_ms: int
    user_id: str
    request_key: str

    @classmethod
    def parse(cls, text: str) -> "Record":
        try:
            state, version, quantity, occurred_ms, user_id, request_key = text.split(",")
            return cls(state, int(version), int(quantity), int(occurred_ms), user_id, request_key)
        except ValueError as error:
            raise ContractViolation("not a reservation record: wrong fields") from error


class Snapshot(NamedTuple):
    """The sale at the moment a reservation was accepted. It becomes part of the event."""

    sale_id: str
    allocated: int
    capacity: int
    revision: int
    engine: str = ""
    """The id of the sale's engine. Empty for a sale that the previous version applied."""


class Answer(NamedTuple):
    """The answer to one request. `detail` is the id of the outbox entry, or a replay's record."""

    outcome: Outcome
    detail: str = ""


@dataclass(frozen=True, slots=True)
class BatchReply:
    """A decided batch: the answers in the order of the requests, and the sale after the batch."""

    now_ms: int
    snapshot: Snapshot
    available: int
    outbox_length: int
    starts_ms: int
    answers: Sequence[Answer]


@dataclass(frozen=True, slots=True)
class OutboxEntry:
    """A reservation event that Kafka has not acknowledged."""

    entry_id: str
    reservation_id: str
    record: Record
    snapshot: Snapshot
    traceparent: str

    @classmethod
    def parse(cls, entry_id: str, fields: Mapping[str, str]) -> "OutboxEntry":
        try:
            sale_id, allocated, capacity, revision = fields["sale"].split(",")
            engine = fields.get("engine", "")
            return cls(
                entry_id=entry_id,
                reservation_id=fields["id"],
                record=Record.parse(fields["record"]),
                snapshot=Snapshot(sale_id, int(allocated), int(capacity), int(revision), engine),
                traceparent=fields["traceparent"],
            )
        except (KeyError, ValueError) as error:
            raise ContractViolation(f"outbox entry {entry_id} cannot be read: {error}") from error


def parse_reply(reply: str) -> BatchReply | Outcome:
    """Parses the reply of `reserve.lua`. A single `Outcome` applies to the whole batch."""
    head, *answers = reply.split("\n")
    if not answers:
        return Outcome(head)
    now_ms, sale_id, allocated, capacity, revision, available, outbox, starts_ms, engine = (
        head.split(",")
    )
    return BatchReply(
        now_ms=int(now_ms),
        snapshot=Snapshot(sale_id, int(allocated), int(capacity), int(revision), engine),
        available=int(available),
        outbox_length=int(outbox),
        starts_ms=int(starts_ms),
        answers=[_ANSWERS.get(answer) or _answer(answer) for answer in answers],
    )


def _answer(line: str) -> Answer:
    word, _, detail = line.partition(" ")
    return Answer(_OUTCOMES[word], detail)


# Calling an Enum would take as long as all other work on an answer, so use a dict.
_OUTCOMES: Final = {outcome.value: outcome for outcome in Outcome}
_ANSWERS: Final = {word: Answer(outcome) for word, outcome in _OUTCOMES.items()}
