"""The verdict on a run that has come to rest: is every promise kept, and do all servers agree?"""

from tests.model.pods import Servers
from tests.model.records import (
    CONFIRMED,
    HELD,
    MAX_PER_USER,
    Event,
    Keys,
    Row,
    SaleHash,
    Tables,
    expired_by_user,
    units_by_user,
)
from tests.model.world import Oracle, Violation


def judge(oracle: Oracle, servers: Servers) -> None:
    """Raises `Violation` if a promise is broken, or if the servers disagree."""
    tables, keys = servers.ledger.tables, servers.redis.keys
    row = tables.row
    if row is None or (keys.sale is None and row.state != "closed"):
        raise Violation("the sale is gone")
    _judge_buyers(oracle, tables)
    _judge_orders(oracle, tables)
    judge_counts(row, tables)
    _must(row.held == 0, f"{row.held} units are held for ever")
    for (reservation_id, _), news in servers.kafka.announced.items():
        if (news.state, news.verdict) == (CONFIRMED, "recorded"):
            found = tables.reservations.get(reservation_id)
            shipped = found is not None and found.confirmed_at is not None
            _must(shipped, f"{news} was announced, but the ledger has {found}")
    for news in servers.ledger.news({*tables.reservations, *tables.refused}):
        received = servers.kafka.received.get(news.reservation_id)
        _must(received == news, f"the ledger has {news}, but the receiver of it {received}")
    if keys.sale is not None:
        _compare(keys.sale, keys, row, tables)


def _judge_buyers(oracle: Oracle, tables: Tables) -> None:
    """Nothing is oversold, no buyer is above the limit, and every 202 is in the ledger."""
    recorded = tables.reservations
    units = units_by_user(recorded.values())
    sold = sum(units.values())
    _must(
        sold <= oracle.highest_stock,
        f"{sold} units are recorded and not released, of {oracle.highest_stock} for sale",
    )
    for user, bought in units.items():
        _must(bought <= MAX_PER_USER, f"{user} has {bought} units in the ledger")
    for reservation_id in oracle.denied & recorded.keys():
        _must(
            oracle.asked[reservation_id] > 1,
            f"{reservation_id} was refused, but is {recorded[reservation_id]}",
        )
    for reservation_id, quantity in oracle.promised.items():
        found = recorded.get(reservation_id)
        if found is None or found.quantity != quantity:
            where = "refused" if reservation_id in tables.refused else "not in the ledger"
            _must(
                oracle.excused(reservation_id),
                f"{reservation_id} ({quantity} units) was promised, but is {found or where}. "
                f"Lost by Redis: {reservation_id in oracle.lost}, its pod killed or "
                f"disconnected: {reservation_id in oracle.orphaned}",
            )
            oracle.counts["excused"] += 1


def _judge_orders(oracle: Oracle, tables: Tables) -> None:
    """Every 200 of a confirmation or cancellation is in the ledger, without any exception."""
    recorded = tables.reservations
    for reservation_id, order in oracle.confirmed.items():
        found = recorded.get(reservation_id)
        _must(
            found is not None
            and found.order_ref == order
            and (found.state == CONFIRMED or (reservation_id, order) in oracle.named),
            f"{reservation_id} was confirmed for {order}, but is {found}",
        )
    for reservation_id in oracle.cancelled:
        found = recorded.get(reservation_id)
        _must(found is not None and found.final, f"{reservation_id} was cancelled, but is {found}")


def judge_counts(row: Row, tables: Tables) -> None:
    """Raises `Violation` if a count of the ledger differs from its reservations."""
    every = tables.reservations.values()
    accepted = sum(event.quantity for event in every)
    released = sum(event.quantity for event in every if event.final)
    held = sum(event.quantity for event in every if event.state == HELD)
    _must(
        (row.accepted, row.released, row.held) == (accepted, released, held),
        f"the ledger counts {row.accepted} accepted, {row.released} released and {row.held} held "
        f"units, but has {accepted}, {released} and {held}",
    )


def _compare(sale: SaleHash, keys: Keys, row: Row, tables: Tables) -> None:
    """Redis and the ledger agree in every reservation, buyer and count."""
    recorded = tables.reservations
    _must(
        (sale.accepted, sale.released, sale.held) == (row.accepted, row.released, row.held),
        f"accepted, released and held are {sale.accepted}, {sale.released} and {sale.held} in "
        f"Redis, but {row.accepted}, {row.released} and {row.held} in the ledger",
    )
    _must(
        _contents(keys.reservations) == _contents(recorded),
        "the reservations of Redis and the ledger differ",
    )
    _must(
        _without_zeros(keys.buyers) == _without_zeros(units_by_user(recorded.values())),
        "the buyers of Redis and the ledger differ",
    )
    _must(
        keys.expired == expired_by_user(recorded.values()),
        f"{keys.expired} holds have expired in Redis, but in the ledger "
        f"{expired_by_user(recorded.values())}",
    )
    _must(
        sale.state == "closed"  # closing does not change the allocation
        or sale.allocated == max(row.allocated, sale.accepted - sale.released),
        f"{sale.allocated} units are allocated, but {row.allocated} are declared",
    )


def _contents(reservations: dict[str, Event]) -> dict[str, tuple[object, ...]]:
    return {known: event.reservation for known, event in reservations.items()}


def _without_zeros(units: dict[str, int]) -> dict[str, int]:
    return {user: quantity for user, quantity in units.items() if quantity}


def _must(holds: bool, violation: str) -> None:
    if not holds:
        raise Violation(violation)
