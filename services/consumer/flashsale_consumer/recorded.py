"""The messages of the topic of recorded reservations, which order services read.

They are CloudEvents 1.0 in binary mode: the attributes are headers and the data is JSON. The
contract is docs/events.md and docs/asyncapi.yaml.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final, Literal, NamedTuple

import msgspec

from flashsale import ledger
from flashsale.ledger import Pool
from flashsale_consumer.recorder import Written

_RESERVATION: Final = "dev.flashsale.reservation.{}.v1"
_REBUILT: Final = "dev.flashsale.sale.rebuilt.v1"

# LATERAL and OFFSET 0 make PostgreSQL look up each row by the primary key, whatever the table's
# statistics say.
_ROWS: Final = """
    SELECT known.sale_id, sales.item_id, known.reservation_id::text, known.user_id, known.quantity,
        known.state, known.version,
        CASE known.state WHEN 'refused' THEN 'refused' ELSE 'recorded' END AS verdict,
        known.accepted_at, known.recorded_at, known.expires_at, known.confirmed_at, known.order_ref
    FROM unnest($1::text[], $2::uuid[]) AS sought (sale_id, reservation_id)
    CROSS JOIN LATERAL (
        SELECT * FROM reservations
        WHERE reservations.sale_id = sought.sale_id
            AND reservations.reservation_id = sought.reservation_id
        OFFSET 0
    ) AS known
    JOIN sales ON sales.sale_id = known.sale_id
"""
_REBUILDS: Final = """
    SELECT sale_id, item_id, rebuilt_revision AS revision, lost FROM sales
    WHERE rebuilt_revision > announced_revision
    ORDER BY sale_id
    LIMIT 1000
"""
# It locks the rows in the order of the recorder, because an UPDATE locks them in any order.
_ANNOUNCED: Final = """
    WITH locked AS (
        SELECT sale_id FROM sales WHERE sale_id = ANY($1::text[]) ORDER BY sale_id FOR UPDATE
    )
    UPDATE sales SET announced_revision = rebuilt.revision
    FROM locked JOIN unnest($1::text[], $2::bigint[]) AS rebuilt (sale_id, revision)
        USING (sale_id)
    WHERE sales.sale_id = locked.sale_id AND announced_revision < rebuilt.revision
"""


class Message(NamedTuple):
    """A record of the topic."""

    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]


class Reservation(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """The ledger's state of a reservation. Fields without a value are left out."""

    sale_id: str
    item_id: str
    reservation_id: str
    user_id: str
    quantity: int
    state: Literal["held", "confirmed", "cancelled", "expired", "refused"]
    version: int
    verdict: Literal["recorded", "refused"]
    accepted_at: datetime
    recorded_at: datetime
    expires_at: datetime | None = None
    confirmed_at: datetime | None = None
    order_ref: str | None = None


class Rebuild(msgspec.Struct, frozen=True, rename="camel"):
    """A sale after a rebuild. `lost` are the units that all its rebuilds did not find."""

    sale_id: str
    item_id: str
    revision: int
    lost: int


class Source:
    """Reads the ledger of one engine, and makes messages of its rows."""

    def __init__(self, pool: Pool, engine_id: str) -> None:
        self._pool = pool
        self._encoder = msgspec.json.Encoder()
        self._constant = (
            ("content-type", b"application/json"),
            ("ce_specversion", b"1.0"),
            ("ce_source", f"urn:uuid:{engine_id}".encode()),
        )
        self._types = {
            state: ("ce_type", _RESERVATION.format(state).encode())
            for state in ("held", "confirmed", "cancelled", "expired", "refused")
        }

    async def reservations(self, names: Sequence[tuple[str, str]]) -> list[Message]:
        """Returns the messages of reservations, by sale id and reservation id.

        Ignores unknown reservations. Raises `LedgerUnavailable`.
        """
        if not names:
            return []
        async with ledger.translated():
            rows = await self._pool.fetch(
                _ROWS, [sale_id for sale_id, _ in names], [name for _, name in names]
            )
        found = [Reservation(*row) for row in rows]
        return [self._reservation(data, _time(data.recorded_at)) for data in found]

    def written(self, batch: Iterable[Written]) -> list[Message]:
        """Returns the messages of rows that are known from the events that wrote them."""
        return [
            self._reservation(
                Reservation(
                    event.sale_id,
                    event.item_id,
                    event.reservation_id,
                    event.user_id,
                    event.quantity,
                    event.state,
                    event.version,
                    "recorded",
                    event.accepted_at.astimezone(UTC),
                    recorded_at,
                    event.expires_at and event.expires_at.astimezone(UTC),
                    event.confirmed_at and event.confirmed_at.astimezone(UTC),
                    event.order_ref,
                ),
                time,
            )
            for recorded_at, events in batch
            for time in [_time(recorded_at)]
            for event in events
        ]

    def _reservation(self, data: Reservation, time: bytes) -> Message:
        subject = f"{data.sale_id}/{data.reservation_id}"
        identity = f"{subject}/{data.version}"
        if data.verdict == "refused":
            identity += "/refused"  # because the ledger can record the same version later
        key = subject.encode()
        headers = [
            *self._constant,
            self._types[data.state],
            ("ce_id", identity.encode()),
            ("ce_subject", key),
            ("ce_time", time),
        ]
        return Message(key, self._encoder.encode(data), headers)

    async def rebuilds(self) -> "list[Rebuild]":
        """Returns the last rebuild of each sale where it is not announced, at most 1,000.

        Raises `LedgerUnavailable`.
        """
        async with ledger.translated():
            return [Rebuild(*row) for row in await self._pool.fetch(_REBUILDS)]

    def rebuilt(self, rebuild: Rebuild) -> Message:
        """Returns the message of a rebuild."""
        key = rebuild.sale_id.encode()
        headers = [
            *self._constant,
            ("ce_type", _REBUILT.encode()),
            ("ce_id", f"{rebuild.sale_id}/rebuilt/{rebuild.revision}".encode()),
            ("ce_subject", key),
            ("ce_time", _time(datetime.now(UTC))),
        ]
        return Message(key, self._encoder.encode(rebuild), headers)

    async def announced(self, rebuilds: Sequence[Rebuild]) -> None:
        """Notes that rebuilds are announced. Raises `LedgerUnavailable`."""
        async with ledger.transaction(self._pool) as connection:
            await connection.execute(
                _ANNOUNCED,
                [rebuild.sale_id for rebuild in rebuilds],
                [rebuild.revision for rebuild in rebuilds],
            )


def _time(at: datetime) -> bytes:
    return at.isoformat().encode()
