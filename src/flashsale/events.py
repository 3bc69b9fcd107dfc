"""Reservation events, which travel from the outbox through Kafka to the ledger.

An event holds the reservation's whole state and a snapshot of its sale, so order and repetition do
not matter. Of two events of a reservation, the one with the higher `version` is newer.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from flashsale.errors import ContractViolation
from flashsale.fields import (
    EngineId,
    ItemId,
    OrderRef,
    Quantity,
    RequestKey,
    ReservationId,
    Revision,
    SaleId,
    Units,
    UserId,
    Version,
)
from flashsale.keys import DEFAULT_ENGINE
from flashsale.reservations import Record, Snapshot
from flashsale.sale import utc_of_ms

SCHEMA: Final = 1
CONTENT_TYPE: Final = b"application/json"


Time = Annotated[datetime, Meta(tz=True)]
_YEARS: Final = range(1971, 9999)
"""A rebuild writes times to Redis in Unix milliseconds, which the scripts read without a sign."""


class Event(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """The value of a Kafka record: a reservation after a change. Times are by Redis' clock."""

    schema: Literal[1]
    reservation_id: ReservationId
    sale_id: SaleId
    item_id: ItemId
    user_id: UserId
    quantity: Quantity
    state: Literal["held", "confirmed", "cancelled", "expired"]
    version: Version
    accepted_at: Time = msgspec.field(name="occurredAt")
    allocated: Units
    capacity: Units
    revision: Revision
    request_key: RequestKey | None = None
    engine: EngineId | None = None
    """The engine that accepted the reservation. Absent in events of the previous version."""
    expires_at: Time | None = None
    """The end of the hold. Absent if the reservation was confirmed at once."""
    confirmed_at: Time | None = None
    order_ref: OrderRef | None = None

    @classmethod
    def of(cls, item_id: str, reservation_id: str, record: Record, snapshot: Snapshot) -> "Event":
        """Makes the event of a reservation from its record in Redis and its sale's snapshot."""
        return cls(
            schema=SCHEMA,
            reservation_id=reservation_id,
            sale_id=snapshot.sale_id,
            item_id=item_id,
            user_id=record.user_id,
            quantity=record.quantity,
            state=record.state.value,
            version=record.version,
            accepted_at=utc_of_ms(record.accepted_ms),
            allocated=snapshot.allocated,
            capacity=snapshot.capacity,
            revision=snapshot.revision,
            request_key=record.request_key or None,
            engine=snapshot.engine or None,
            expires_at=None if record.expires_ms is None else utc_of_ms(record.expires_ms),
            confirmed_at=None if record.confirmed_ms is None else utc_of_ms(record.confirmed_ms),
            order_ref=record.order_ref or None,
        )


def topic(engine: str = DEFAULT_ENGINE) -> str:
    """Returns the engine's topic of reservation events."""
    return f"{engine}.reservations"


def dead_letter_topic(engine: str = DEFAULT_ENGINE) -> str:
    """Returns the engine's topic of records that the consumer cannot record."""
    return f"{topic(engine)}.dlq"


def recorded_topic(engine: str = DEFAULT_ENGINE) -> str:
    """Returns the engine's topic of recorded reservations, which order services read."""
    return f"{engine}.recorded"


def consumer_group(engine: str = DEFAULT_ENGINE) -> str:
    """Returns the consumer group that records the engine's events."""
    return f"{engine}-ledger"


_OWNER: Final = "engine="


def owner_metadata(engine_id: str) -> str:
    """Returns the metadata of the group's committed offsets. It names the group's engine."""
    return _OWNER + engine_id


def owner(metadata: str | None) -> str | None:
    """Returns the engine id in the metadata of a committed offset, if there is one."""
    found = (metadata or "").partition(_OWNER)[2]
    return found or None


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Event)
_FORMER_STATE: Final = b'"state":"accepted"'


def encode(event: Event) -> bytes:
    """Encodes an event as JSON."""
    return _encoder.encode(event)


def decode(value: bytes | None) -> Event:
    """Decodes the value of a Kafka record. Raises `ContractViolation` with the reason."""
    if value is None:
        raise ContractViolation("the record has no value")
    try:
        # The previous version called a confirmed reservation accepted.
        event = _decoder.decode(value.replace(_FORMER_STATE, b'"state":"confirmed"'))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ContractViolation(f"not a reservation event: {error}") from error
    for name, time in (
        ("occurredAt", event.accepted_at),
        ("expiresAt", event.expires_at),
        ("confirmedAt", event.confirmed_at),
    ):
        if time is not None and time.year not in _YEARS:
            raise ContractViolation(
                f"not a reservation event: {name} must be in the years 1971 to 9998"
            )
    if event.state == "confirmed" and event.confirmed_at is None:
        # A pod of the previous version published it. That version had no holds.
        return msgspec.structs.replace(event, confirmed_at=event.accepted_at)
    return event


def traceparent(headers: Iterable[tuple[str, bytes | None]]) -> str:
    """Returns the traceparent in a record's headers, or an empty string.

    Other producers can write a header without a value, or with any bytes.
    """
    for name, value in headers:
        if name == "traceparent":
            return (value or b"").decode("ascii", "replace")
    return ""


def headers(traceparent: str) -> list[tuple[str, bytes]]:
    """Returns the headers of an event's record. `traceparent` (W3C) may be empty."""
    own = [("content-type", CONTENT_TYPE), ("schema", b"1")]
    return [("traceparent", traceparent.encode()), *own] if traceparent else own
