"""The commands of `flashsalectl` that change nothing."""

import asyncio
import sys
from collections.abc import Callable, Container, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

import click

from flashsale import __version__, ledger, redis_facts, settings
from flashsale.errors import FlashsaleError, LedgerUnavailable, RedisUnavailable
from flashsale.sale import rfc3339
from flashsale_operator.ctl import doctor as examination
from flashsale_operator.ctl import files, sales, tables
from flashsale_operator.ctl import report as summary
from flashsale_operator.ctl import reservations as listing
from flashsale_operator.ctl.cli import (
    Clients,
    Environ,
    Servers,
    Stores,
    command,
    connected,
    item_argument,
    no_such,
    output_option,
    warn,
)
from flashsale_operator.ctl.report_html import html_of
from flashsale_operator.ctl.report_text import text_of
from flashsale_operator.sales import audit as auditing
from flashsale_operator.sales import engine, offsets
from flashsale_operator.sales.decision import last_of_items
from flashsale_operator.sales.reconciler import UnknownSale

WATCH_SECONDS: Final = 1.0
_STATES: Final = "SELECT state, count(*) FROM reservations WHERE sale_id = $1 GROUP BY state"


@command("get", "get iphone_15 -o yaml", "get --watch")
@output_option(*sales.FORMATS)
@click.option("-w", "--watch", is_flag=True, help="Show every change until Ctrl-C.")
@click.option("--all", "every", is_flag=True, help="Also closed sales whose keys are freed.")
@item_argument(required=False)
async def get(environ: Environ, item: str | None, output: str, *, watch: bool, every: bool) -> int:
    """Show the sales of one item, or all that have keys in Redis."""
    async with connected(settings.load(Stores, environ), item) as clients:
        found, unread = await _sales(clients, item, every=every)
        # No sales are an empty list for a program, and a watch waits for the first sale.
        if not (found or unread) and (
            item is not None or not (watch or output in {"json", "yaml"})
        ):
            raise UnknownSale("there are no sales" if item is None else no_such(item))
        if not watch:
            print(sales.FORMATS[output](found))
            if unread:
                warn(unread)
            return 1 if unread else 0
        changes, said = sales.Changes(output), ""
        while True:
            for line in changes.lines(found):
                print(line, flush=True)
            if unread not in ("", said):  # once, and the watch goes on
                warn(unread)
            said = unread
            await asyncio.sleep(WATCH_SECONDS)
            try:
                found, unread = await _sales(clients, item, every=every, shown=changes.shown)
            except (RedisUnavailable, LedgerUnavailable) as error:
                unread = str(error)


@command("describe iphone_15")
@item_argument()
async def describe(environ: Environ, item: str) -> int:
    """Show everything about the sales of an item."""
    async with connected(settings.load(Stores, environ), item) as clients:
        found, unread = await _sales(clients, item, every=True)
        if not (found or unread):
            raise UnknownSale(no_such(item))
        described = []
        for sale in found:
            async with ledger.translated():
                records = await clients.pool.fetch(_STATES, sale.sale_id)
            states = {record["state"]: record["count"] for record in records}
            described.append(sales.description(sale, states))
    if described:
        print("\n\n".join(described))
    if unread:
        warn(unread)
    return 1 if unread else 0


async def _sales(
    clients: Clients, item: str | None, *, every: bool, shown: Container[str] = ()
) -> tuple[list[sales.SaleView], str]:
    """Returns the sales, and a sentence about items that cannot be read.

    A closed sale whose keys are freed is left out, unless `shown` has its id.
    """
    await engine.require_own(clients.inventory, clients.pool)
    rows = await ledger.sales(clients.pool, item)
    recorded = {row.item_id for row in rows}
    items = [item] if item else await clients.inventory.index.items(recorded)
    holders, servers, unread = await clients.inventory.survey(items)
    last = last_of_items(rows)
    if item is None and not every:
        present = {sale.sale_id for sale in holders.values()}
        rows = [
            row
            for row in rows
            if not row.closed or row.held or row.sale_id in present or row.sale_id in shown
        ]
    return sales.views(rows, holders, servers, last), unread


@command("audit", "audit iphone_15")
@item_argument(required=False)
async def audit(environ: Environ, item: str | None) -> int:
    """Check that Redis, outbox, Kafka and ledger agree. Exits with 1 if they do not."""
    addresses = settings.load(Servers, environ)
    async with connected(addresses, item) as clients:
        await engine.require_own(clients.inventory, clients.pool)
        spans = partial(offsets.spans, addresses)
        found = await auditing.audit(clients.inventory, clients.pool, spans, item)
        if item is not None and not (found.findings or found.unread):
            raise UnknownSale(no_such(item))
    print(tables.of_audit(found))
    if found.unread:
        warn(found.unread)
    return 0 if found.agrees else 1


@command("report iphone_15", "report iphone_15 -o json", "report iphone_15 ticket --html sale.html")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), help="The format. [text]")
@click.option(
    "--html",
    metavar="FILE",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write one HTML file instead.",
)
@item_argument(nargs=-1)
async def report(
    environ: Environ, items: Sequence[str], output: str | None, html: Path | None
) -> int:
    """Report the sales of items: units, buyers, times and rates.

    The figures are those of the ledger, during a sale or after it. Without Redis or Kafka the
    report says that the sale was not audited.
    """
    if output and html:
        click.get_current_context().fail("-o and --html exclude each other.")
    addresses = settings.load(Servers, environ)
    reports = []
    for item in dict.fromkeys(items):
        async with connected(addresses, item) as clients:
            rows = await ledger.sales(clients.pool, item)
            if not rows:
                raise UnknownSale(no_such(item))
            result_of, versions = await _audited(clients, addresses, item)
            reports += [
                await summary.report(clients.pool, row.sale_id, result_of(row.sale_id), versions)
                for row in rows
            ]
    if html is not None:
        files.write(html, html_of(reports))
        print(f"the report is in {html}")
    elif output == "json":
        print(tables.json_of(reports))
    else:
        print("\n\n".join(map(text_of, reports)))
    return 0


async def _audited(
    clients: Clients, addresses: Servers, item: str
) -> tuple[Callable[[str], summary.AuditResult], dict[str, str]]:
    """Returns the result of each sale of an item, and the versions of the engine and Redis."""
    versions = {"flashsale": __version__}
    findings, failure = {}, ""
    faults: list[str] = []
    try:
        inventory = clients.inventory
        await engine.require_own(inventory, clients.pool)
        facts = await redis_facts.read(inventory.redis, inventory.engine)
        versions["redis"] = facts[0].version or "unknown"
        spans = partial(offsets.spans, addresses)
        found = await auditing.audit(clients.inventory, clients.pool, spans, item)
        findings = {finding.sale_id: finding for finding in found.findings}
        faults = [f"topic {found.topic}: {fault}" for fault in found.topic_faults]
        failure = found.unread
    except FlashsaleError as error:
        failure = str(error)
    at = rfc3339(datetime.now(UTC))

    def result_of(sale_id: str) -> summary.AuditResult:
        finding = findings.get(sale_id)
        if finding is None:
            return summary.AuditResult("not audited", [failure or "the sale is new"], at)
        word = auditing.Verdict.DISAGREES if faults else finding.verdict
        return summary.AuditResult(word, [*finding.notes, *faults], at)

    return result_of, versions


@command("reservations iphone_15", "reservations iphone_15 -o csv > reservations.csv")
@output_option(*listing.WRITERS)
@item_argument()
async def reservations(environ: Environ, item: str, output: str) -> int:
    """Show the reservations of an item in the ledger."""
    async with connected(settings.load(Stores, environ), item) as clients:
        if not await ledger.sales(clients.pool, item):
            raise UnknownSale(no_such(item))
        async with aclosing(listing.pages(clients.pool, item)) as pages:
            await listing.WRITERS[output](sys.stdout, pages)
        sys.stdout.flush()
    return 0


@command("doctor", "doctor -o json")
@output_option("table", "json")
async def doctor(environ: Environ, output: str) -> int:
    """Check Redis, Kafka, PostgreSQL and the cluster from here. Exits with 1 on a failure."""
    found = await examination.examine(settings.load(Servers, environ), environ)
    print(tables.of_findings(found) if output == "table" else tables.json_of(found))
    return 1 if any(finding.verdict == "failure" for finding in found) else 0
