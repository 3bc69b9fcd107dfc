"""The values that Redis takes and returns: requests, outcomes, records, outbox entries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final, Literal, NamedTuple, TypeAlias

from flashsale.errors import ContractViolation
from flashsale.sale import ms_of_text

BATCH_LIMIT: Final = 128
"""Requests in one `reserve` call. Such a call blocks Redis for at most about 2 ms."""


class Word(StrEnum):
    """A word of a script. Its hash is that of the text, because an Enum's own takes much longer."""

    __hash__ = str.__hash__


class Outcome(Word):
    """Outcomes of a request in `reserve.lua`, with the script's own words."""

    ACCEPTED = "accepted"
    REPLAYED = "replayed"
    KEY_REUSED = "key_reused"
    ENDED = "ended"
    PAUSED = "paused"
    NOT_OPEN = "not_open"
    LIMIT_REACHED = "limit_reached"
    TOO_MANY_HOLDS = "too_many_holds"
    SOLD_OUT = "sold_out"
    NOT_ENOUGH_LEFT = "not_enough_left"
    OUTBOX_FULL = "outbox_full"
    UNREADABLE = "unreadable"
    UNKNOWN = "unknown"
    UNSUPPORTED = "unsupported"
    FENCED = "fenced"
    OTHER_ENGINE = "other_engine"


class Transition(Word):
    """Outcomes of a call of `confirm.lua` or `cancel.lua`, with the scripts' own words."""

    CHANGED = "changed"
    REPLAYED = "replayed"
    UNKNOWN_RESERVATION = "unknown_reservation"
    UNREADABLE = "unreadable"
    HOLD_EXPIRED = "hold_expired"
    CANCELLED = "cancelled"
    OTHER_ORDER = "other_order"
    OTHER_SALE = "other_sale"
    UNKNOWN = "unknown"
    UNSUPPORTED = "unsupported"
    FENCED = "fenced"
    OTHER_ENGINE = "other_engine"


class State(Word):
    """The states of a reservation. The last two are final. `refused` exists in the ledger only."""

    HELD = "held"
    CONFIRMED = "confirmed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


FINAL: Final = frozenset({State.CANCELLED, State.EXPIRED})


class Request(NamedTuple):
    """A request of a batch. Its fields satisfy `fields.py`. The last two may be empty."""

    reservation_id: str
    user_id: str
    quantity: int
    request_key: str = ""
    traceparent: str = ""


Verb: TypeAlias = Literal["confirm", "cancel"]
"""An order service's change of a reservation."""


class OrderCall(NamedTuple):
    """A call to confirm or cancel a reservation. `cancel` permits an empty `order_ref`.

    A call with a `sale_id` is refused if the item has another sale.
    """

    reservation_id: str
    order_ref: str = ""
    traceparent: str = ""
    sale_id: str = ""


class Record(NamedTuple):
    """A reservation as stored in Redis. Times are Redis' clock in Unix milliseconds.

    `expires_ms` is set if the reservation was a hold. `order_ref` is the shop's order, or empty.
    """

    state: State
    version: int
    quantity: int
    accepted_ms: int
    user_id: str
    request_key: str
    expires_ms: int | None = None
    confirmed_ms: int | None = None
    order_ref: str = ""

    @classmethod
    def parse(cls, text: str) -> "Record":
        """Parses the text of a record. The previous version called a confirmed one accepted."""
        try:
            state, version, quantity, accepted_ms, user_id, request_key, *rest = text.split(",")
            known = State.CONFIRMED if state == "accepted" else State(state)
            expires_ms, confirmed_ms, order_ref = rest or ("", accepted_ms, "")
            return cls(
                known,
                int(version),
                int(quantity),
                ms_of_text(accepted_ms),
                user_id,
                request_key,
                ms_of_text(expires_ms) if expires_ms else None,
                ms_of_text(confirmed_ms) if confirmed_ms else None,
                order_ref,
            )
        except ValueError as error:
            raise ContractViolation("not a reservation record: wrong fields") from error

    def __str__(self) -> str:
        """Returns the text of the record."""
        return ",".join("" if field is None else str(field) for field in self)


class Snapshot(NamedTuple):
    """The sale at the moment a reservation was accepted. It becomes part of the event."""

    sale_id: str
    allocated: int
    capacity: int
    revision: int
    engine: str = ""
    """The id of the sale's engine. Empty for a sale that the previous version applied."""


class Answer(NamedTuple):
    """The answer to one request.

    `detail` is the id of an accepted request's outbox entry, the record of a replay, or, if the
    limit is reached, the user's units and the sale's `maxPerUser`.
    """

    outcome: Outcome
    detail: str = ""


class BatchReply(NamedTuple):
    """A decided batch: the answers in the order of the requests, and the sale after the batch.

    It is a tuple, because each item of a call has one, and a frozen dataclass takes longer to make.
    A reservation that the batch accepted has `version`, and is a hold of `hold_ms` if that is not
    0. `held` counts the units of open holds.
    """

    now_ms: int
    snapshot: Snapshot
    available: int
    starts_ms: int
    version: int
    hold_ms: int
    held: int
    answers: Sequence[Answer]


class TransitionAnswer(NamedTuple):
    """The answer to one call. A changed reservation has an outbox entry, and a replay has none.

    `record` is the reservation after the call, unless the call was refused.
    """

    outcome: Transition
    entry_id: str = ""
    record: Record | None = None


@dataclass(frozen=True, slots=True)
class TransitionReply:
    """A decided batch of calls: the answers in the order of the calls, and the sale."""

    now_ms: int
    snapshot: Snapshot
    answers: Sequence[TransitionAnswer]


@dataclass(frozen=True, slots=True)
class Expired:
    """Holds that a call of `expire.lua` ended: (reservation id, outbox entry id, record) each."""

    now_ms: int
    snapshot: Snapshot
    holds: Sequence[tuple[str, str, Record]]


class OutboxEntry(NamedTuple):
    """A reservation event that Kafka has not acknowledged, and the id of its entry.

    `entry_id` is empty for a replay, whose entry may be deleted already.
    """

    item_id: str
    entry_id: str
    reservation_id: str
    record: Record
    snapshot: Snapshot
    traceparent: str

    @classmethod
    def parse(cls, item_id: str, entry_id: str, fields: Mapping[str, str]) -> "OutboxEntry":
        """Parses the fields of an entry. Raises `ContractViolation`."""
        try:
            sale_id, allocated, capacity, revision = fields["sale"].split(",")
            engine = fields.get("engine", "")
            return cls(
                item_id=item_id,
                entry_id=entry_id,
                reservation_id=fields["id"],
                record=Record.parse(fields["record"]),
                snapshot=Snapshot(sale_id, int(allocated), int(capacity), int(revision), engine),
                traceparent=fields["traceparent"],
            )
        except (KeyError, ValueError, ContractViolation) as error:
            raise ContractViolation(f"outbox entry {entry_id} cannot be read: {error}") from error


def parse_reply(reply: str) -> BatchReply | Outcome:
    """Parses the reply of `reserve.lua`. A single `Outcome` applies to the whole batch.

    Raises `ContractViolation` if the fields of the sale are damaged.
    """
    head, *answers = reply.split("\n")
    try:
        if not answers:
            return Outcome(head)
        *counts, snapshot = head.split(",", 6)
        now_ms, available, starts_ms, version, hold_ms, held = map(int, counts)
        return BatchReply(
            now_ms,
            _snapshot(snapshot),
            available,
            starts_ms,
            version,
            hold_ms,
            held,
            [_ANSWERS.get(answer) or _answer(answer) for answer in answers],
        )
    except (KeyError, ValueError) as error:
        raise ContractViolation(f"a reply of reserve.lua cannot be read: {error}") from error


def parse_transitions(reply: str) -> TransitionReply | Transition:
    """Parses the reply of `confirm.lua` or `cancel.lua`. A single word applies to all calls."""
    head, *answers = reply.split("\n")
    if not answers:
        return Transition(head)
    now_ms, snapshot = _sale(head)
    return TransitionReply(now_ms, snapshot, [_transition(answer) for answer in answers])


def parse_expired(reply: str) -> Expired | Transition:
    """Parses the reply of `expire.lua`."""
    head, *lines = reply.split("\n")
    if "," not in head:
        return Transition(head)
    now_ms, snapshot = _sale(head)
    holds = [line.split(" ") for line in lines]
    return Expired(
        now_ms, snapshot, [(own_id, entry, Record.parse(text)) for own_id, entry, text in holds]
    )


def _sale(head: str) -> tuple[int, Snapshot]:
    now_ms, _, snapshot = head.partition(",")
    return int(now_ms), _snapshot(snapshot)


@lru_cache(maxsize=10_000)  # a sale's snapshot stays the same until units are released
def _snapshot(text: str) -> Snapshot:
    sale_id, allocated, capacity, revision, engine = text.split(",")
    return Snapshot(sale_id, int(allocated), int(capacity), int(revision), engine)


def _transition(line: str) -> TransitionAnswer:
    word, *details = line.split(" ")
    record = Record.parse(details.pop()) if details else None
    return TransitionAnswer(Transition(word), "".join(details), record)


def _answer(line: str) -> Answer:
    word, _, detail = line.partition(" ")
    return Answer(_OUTCOMES[word], detail)


# Calling an Enum would take as long as all other work on an answer, so use a dict.
_OUTCOMES: Final = {outcome.value: outcome for outcome in Outcome}
_ANSWERS: Final = {word: Answer(outcome) for word, outcome in _OUTCOMES.items()}
