"""Records batches of events with the recorder, and checks the ledger's counts."""

from collections.abc import Sequence
from uuid import UUID

from flashsale.events import Event
from flashsale_consumer import recorder
from flashsale_consumer.clients import transaction
from flashsale_consumer.recorded import Source
from flashsale_consumer.recorder import BatchOutcome
from tests.support.ledgers import Ledger


async def record(ledger: Ledger, events: Sequence[Event]) -> BatchOutcome:
    """Record a batch. Check that the messages of known rows equal those that the ledger gives."""
    async with transaction(ledger.pool) as connection:
        outcome = await recorder.record(connection, "reservations", {}, {}, events)
        source = Source(ledger.pool, str(UUID(int=0)))
        known = source.written(outcome.written)
        source._pool = connection  # type: ignore[assignment] # before another consumer's commit
        names = {(event.sale_id, event.reservation_id) for event in known_events(outcome)}
        assert sorted(known) == sorted(await source.reservations(list(names)))
        return outcome


def known_events(outcome: BatchOutcome) -> list[Event]:
    return [event for written in outcome.written for event in written.events]


async def rebuild(ledger: Ledger, revision: int) -> None:
    """Leave the traces of a rebuild in the ledger."""
    await ledger.pool.execute("UPDATE sales SET rebuilt_revision = $1, revision = $1", revision)


async def counts(ledger: Ledger, sale_id: str = "default/phones") -> tuple[int, int, int]:
    """Return the accepted, held and released units."""
    sale = await ledger.sale(sale_id)
    return sale.accepted, sale.held, sale.released


def counted(events: Sequence[Event]) -> tuple[int, int, int]:
    """Return the accepted, held and released units of reservations, from their last versions."""
    return (
        sum(event.quantity for event in events),
        sum(event.quantity for event in events if event.state == "held"),
        sum(event.quantity for event in events if event.state in ("cancelled", "expired")),
    )


async def check(ledger: Ledger, sale_id: str, last: Sequence[Event]) -> None:
    """Check that the ledger has exactly these versions, and the counts that follow from them."""
    rows = await ledger.pool.fetch("SELECT * FROM reservations WHERE sale_id = $1", sale_id)
    names = ["user_id", "quantity", "state", "version", "request_key", "accepted_at", "expires_at"]
    names += ["confirmed_at", "order_ref"]
    assert {str(row["reservation_id"]): [row[name] for name in names] for row in rows} == {
        event.reservation_id: [getattr(event, name) for name in names] for event in last
    }
    assert await counts(ledger, sale_id) == counted(last)
