"""The commands of `flashsalectl` for people in trouble."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Final

import click

from flashsale import ledger, schema, settings
from flashsale.errors import FlashsaleError
from flashsale.fields import RESERVATION_ID, USER_ID
from flashsale.ledger import SaleRow
from flashsale.requirements import Checks
from flashsale.reservations import OrderCall, Verb
from flashsale_operator.ctl import tables
from flashsale_operator.ctl.cli import (
    Clients,
    Environ,
    Servers,
    Stores,
    command,
    connected,
    for_each,
    item_argument,
    no_such,
    warn,
)
from flashsale_operator.sales import engine, index, offsets, transitions
from flashsale_operator.sales.decision import counted, last_of_items, needs_rebuild
from flashsale_operator.sales.drain import Drain
from flashsale_operator.sales.rebuild import Rebuilder, Rebuilt
from flashsale_operator.sales.reconciler import Reconciler, UnknownSale
from flashsale_operator.sales.republish import republish as publish_again


@command("rebuild iphone_15", "rebuild --all")
@click.option("--all", "every", is_flag=True, help="Every fenced sale.")
@item_argument(required=False)
async def rebuild(environ: Environ, item: str | None, *, every: bool) -> int:
    """Rebuild fenced sales in Redis from the ledger."""
    if every == (item is not None):
        click.get_current_context().fail("Name one ITEM, or use --all.")
    addresses = settings.load(Servers, environ)
    async with connected(addresses, item) as clients:
        await engine.require_redis(Checks(), clients.inventory)
        rows = await ledger.sales(clients.pool, item)
        chosen, unread = await _fenced(clients, rows)
        if item is not None:
            if not rows:
                raise UnknownSale(no_such(item))
            # Of several, prefer the one that is not closed, because it has the item. Then one with
            # open holds.
            row = min(rows, key=lambda row: (row not in chosen, row.closed, not row.held))
            chosen = [row] if row in chosen else []
            if not chosen and not unread:
                print(tables.line_of_rebuild(row.sale_id, Rebuilt(row.accepted)))
                return 0
        done = await for_each(chosen, rebuilder_of(clients, addresses).rebuild)
    for row, result in zip(chosen, done, strict=True):
        line = (
            f"sale {row.sale_id}: {result}"
            if isinstance(result, FlashsaleError)
            else tables.line_of_rebuild(row.sale_id, result)
        )
        print(line, file=sys.stdout if isinstance(result, Rebuilt) else sys.stderr)
    if unread:
        warn(unread)
    return 0 if not unread and all(isinstance(result, Rebuilt) for result in done) else 1


async def _fenced(clients: Clients, rows: Sequence[SaleRow]) -> tuple[list[SaleRow], str]:
    """Returns the rows of fenced sales, and a sentence about items that cannot be read."""
    holders, servers, unread = await clients.inventory.survey({row.item_id for row in rows})
    last = last_of_items(rows)
    fenced = [
        row
        for row in rows
        if (server := servers.get(row.item_id))
        and needs_rebuild(row, holders.get(row.item_id), server, last=row.sale_id in last)
    ]
    return fenced, unread


@command("republish iphone_15")
@item_argument()
async def republish(environ: Environ, item: str) -> int:
    """Publish an item's reservations to Kafka again.

    Use it after Kafka lost them. Redis still has them.
    """
    addresses = settings.load(Servers, environ)
    async with connected(addresses, item, uses_ledger=False) as clients:
        published = await publish_again(clients.inventory, addresses, item)
    done = f"{counted(published, 'reservation')} published again"
    print(f"{item}: {done}; check with `flashsalectl audit`")
    return 0


def _reservation_id(_: click.Context, __: click.Parameter, text: str) -> str:
    if RESERVATION_ID.match(text) is None:
        raise click.BadParameter("must be a UUID in lower case")
    return text


def _order_ref(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    if text is not None and USER_ID.match(text) is None:
        raise click.BadParameter("must be 1 to 128 of the characters A-Z a-z 0-9 . _ ~ @ : | + = -")
    return text


_reservation_argument = click.argument(
    "reservation", metavar="RESERVATION", callback=_reservation_id
)
_order_ref_option = partial(
    click.option,
    "--order-ref",
    metavar="REF",
    callback=_order_ref,
    help="The shop's reference of the order.",
)
_AN_ID: Final = "019ac3f1-5c1e-7d10-9b6e-8a4f5f6c7d21"


@command(f"confirm ticket {_AN_ID} --order-ref order-7")
@_order_ref_option(required=True)
@item_argument()
@_reservation_argument
async def confirm(environ: Environ, item: str, reservation: str, order_ref: str) -> int:
    """Confirm a reservation for an order, if the shop cannot. Repeats are safe."""
    return await _change("confirm", environ, item, reservation, order_ref)


@command(f"cancel ticket {_AN_ID}", f"cancel ticket {_AN_ID} --order-ref order-7")
@_order_ref_option()
@item_argument()
@_reservation_argument
async def cancel(environ: Environ, item: str, reservation: str, order_ref: str | None) -> int:
    """Cancel a reservation, if the shop cannot.

    One that is confirmed for an order needs the reference of that order.
    """
    return await _change("cancel", environ, item, reservation, order_ref)


async def _change(
    verb: Verb, environ: Environ, item: str, reservation: str, order_ref: str | None
) -> int:
    addresses = settings.load(Servers, environ)
    async with connected(addresses, item) as clients:
        outcome = await transitions.change(
            clients.inventory,
            addresses,
            item,
            verb,
            OrderCall(reservation, order_ref or ""),
            engine_id=await engine.claimed_id(clients.inventory, clients.pool),
        )
    line, success = tables.line_of_change(reservation, verb, outcome, order_ref)
    print(line, file=sys.stdout if success else sys.stderr)
    return 0 if success else 1


@command("adopt-redis", name="adopt-redis")
async def adopt_redis(environ: Environ) -> int:
    """Move the sales to another Redis. First stop the API pods that use the former one."""
    async with connected(settings.load(Stores, environ)) as clients:
        await schema.migrate(clients.pool, clients.inventory.engine)
        await clients.inventory.clocks()  # raises RedisUnavailable for a wrong address
        own = await ledger.engine_id(clients.pool, clients.inventory.engine)
        await clients.inventory.index.claim(own, await index.wanted(clients.pool))
        # A Redis that the sales had left before would sell units again until the rebuilds.
        await Reconciler(clients.inventory, clients.pool).stop_all_outdated(own)
        address = clients.inventory.address
        former = await ledger.adopt_redis(clients.pool, address)
    if former in (None, address):
        print(f"the sales are in the Redis at {address}")
    else:
        print(
            f"the sales move from the Redis at {former} to {address}: the operator rebuilds them; "
            "without an operator, run `flashsalectl rebuild --all`"
        )
    return 0


def rebuilder_of(clients: Clients, addresses: Servers) -> Rebuilder:
    """Returns a rebuilder that reports its progress to a terminal."""
    spans = offsets.SharedSpans(partial(offsets.spans, addresses))
    drain = Drain(clients.inventory, clients.pool, spans)
    return Rebuilder(clients.inventory, clients.pool, drain, _progress)


def _progress(sale_id: str, step: str) -> None:
    if sys.stderr.isatty():
        print(f"sale {sale_id}: {step}", file=sys.stderr)
