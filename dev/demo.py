"""`python -m dev.demo`: 100 phones, then 100 tickets with holds, on real servers.

Every unit is accounted for in the end.
"""

import argparse
import asyncio
import json
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Final, TypeAlias

import uvloop

from dev.checkout import checkout, outcome
from dev.crowd import attempts, percentile, stampede
from dev.issuer import Issuer
from dev.journal import Journal
from dev.local import API_PORT, CLUSTER, SAMPLE, start_stack
from dev.paths import LOCAL, ROOT
from dev.progress import ending_quietly
from dev.services import Addresses, ApiServer, ConsumerServer, flashsalectl
from dev.stack.process import Server
from dev.verdict import judge, quiet
from flashsale_operator.sales.manifest import API_VERSION, KIND

USERS: Final = 2_400
CONNECTIONS: Final = 100
ITEM: Final = "iphone_15"
SALE: Final = "default/iphone-15"
GUESTS: Final = 2_000
TICKETS: Final = 100
HOLD_SECONDS: Final = 2
TICKET: Final = "ticket"
REPORT: Final = LOCAL / "demo-report.html"
TokenOf: TypeAlias = Callable[[str], str]
"""Returns a buyer's token, or "" if the body names the buyer."""

_SERVERS: Final = {
    "--redis": "FLASHSALE_REDIS_URL",
    "--kafka": "FLASHSALE_KAFKA_BOOTSTRAP",
    "--database": "FLASHSALE_DATABASE_URL",
}


def demo(named: Mapping[str, str], *, tokens: bool = False) -> int:
    """Run the demonstration on fresh servers. Returns 0 only if every promise was kept.

    With `tokens` the API takes the buyers from tokens of an issuer.

    A server whose address is in `named` is used as it is. "cluster" for Redis starts a cluster.
    The environment's addresses are not used, because a running engine may have them.
    """
    data = LOCAL / "demo"
    shutil.rmtree(data, ignore_errors=True)
    print("Starting real servers (the first run downloads Kafka) …", flush=True)
    with ExitStack() as running:

        def started(server: Server) -> None:
            running.callback(server.stop)

        others = {name: value for name, value in named.items() if value != CLUSTER}
        addresses = start_stack(data, others, started, clustered=others != named)
        issuer = running.enter_context(Issuer()) if tokens else None
        token_of: TokenOf = cache(issuer.token) if issuer else lambda _: ""
        api = ApiServer(
            data / "api",
            addresses,
            order_tokens=secrets.token_urlsafe(32),
            settings=issuer.settings if issuer else None,
        )
        for service in (ConsumerServer(data / "consumer", addresses), api):
            running.enter_context(service)
            print(f"  {service.name:9} on {service.url}", flush=True)
        kept = [_phones(addresses, api, token_of), _tickets(addresses, api, data, token_of)]
        flashsalectl(addresses, "report", ITEM, TICKET, "--html", str(REPORT), quiet=True)
    shutil.rmtree(data, ignore_errors=True)
    print(f"""
A report of both sales for the browser: {REPORT.relative_to(ROOT)}

Start the engine in the background with `make up`, then try:

  curl -X POST localhost:{API_PORT}/reserve -H "Content-Type: application/json" \\
    -d '{{"userId":"user1","itemId":"{ITEM}","quantity":1}}'""")
    return 0 if all(kept) else 1


def _phones(addresses: Addresses, api: ApiServer, token_of: TokenOf) -> bool:
    """Sell 100 phones to a stampede. Returns whether every promise was kept."""
    flashsalectl(addresses, "apply", "-f", str(SAMPLE))
    made = attempts(ITEM, USERS, seed=15)
    wanted = [replace(attempt, token=token_of(attempt.user_id)) for attempt in made]
    print(f"{len(wanted):,} requests by {USERS:,} users …", flush=True)
    begun = time.perf_counter()
    journal = uvloop.run(stampede([api.url], wanted, connections=CONNECTIONS, tries=5))
    seconds = time.perf_counter() - begun
    print("Waiting until every event is in the ledger …", flush=True)
    asyncio.run(quiet(addresses, [ITEM]))
    verdict, recorded = asyncio.run(judge(addresses, SALE, journal))
    _report(journal, seconds, recorded)
    failed = [entry for entry in journal.entries if entry.status == 0 or entry.status >= 500]
    print(f"\n{verdict}")
    if failed:
        print(f"{len(failed)} requests failed. The first: {failed[0]}")
    return verdict.kept and verdict.sold == verdict.allocated and not failed


def _tickets(addresses: Addresses, api: ApiServer, data: Path, token_of: TokenOf) -> bool:
    """Sell 100 tickets with holds, until all are paid. Returns whether every promise was kept."""
    manifest = data / "tickets.yaml"
    spec = {"itemId": TICKET, "stock": TICKETS, "holdSeconds": HOLD_SECONDS}
    metadata = {"name": TICKET}
    sale = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec}
    manifest.write_text(json.dumps(sale))  # JSON is YAML
    print(f"\n{GUESTS:,} guests want {TICKETS} tickets. A third of them never pay …", flush=True)
    flashsalectl(addresses, "apply", "-f", str(manifest))
    begun = time.perf_counter()
    made = uvloop.run(
        checkout(
            api.url,
            api.orders_url,
            api.order_tokens,
            TICKET,
            buyers=GUESTS,
            units=TICKETS,
            seed=15,
            token_of=token_of,
        )
    )
    seconds = time.perf_counter() - begun
    asyncio.run(quiet(addresses, [TICKET]))
    verdict, _ = asyncio.run(judge(addresses, f"default/{TICKET}", made.journal))
    found = asyncio.run(outcome(addresses, f"default/{TICKET}", made))
    print(
        f"{len(made.journal.entries):,} attempts in {seconds:.1f} s: {found.expired} holds "
        f"expired, {found.resold} units were sold again"
    )
    print(
        f"\nconfirmed {found.confirmed} of {TICKETS}, oversold {verdict.oversold}, "
        f"lost {verdict.lost + found.broken}, duplicates {verdict.duplicates}"
    )
    return verdict.kept and not found.broken and found.confirmed == TICKETS


def _report(journal: Journal, seconds: float, recorded: dict[str, float]) -> None:
    entries = journal.entries
    print(
        f"\n{len(entries):,} requests in {seconds:.1f} s: {len(entries) / seconds:,.0f} RPS "
        f"over {CONNECTIONS} connections"
    )
    for (status, kind), count in sorted(journal.outcomes().items()):
        print(f"  {status} {kind:24} {count:>7,}")
    accepted = journal.accepted()
    _percentiles("accepted", [entry.seconds for entry in accepted.values()])
    _percentiles("rejected", [entry.seconds for entry in entries if 400 <= entry.status < 500])
    to_row = [
        recorded[identity] - entry.received_at
        for identity, entry in accepted.items()
        if identity in recorded
    ]
    _percentiles("202 to row", to_row)


def _percentiles(title: str, seconds: list[float]) -> None:
    numbers = "  ".join(f"P{p} {percentile(seconds, p) * 1000:6.1f} ms" for p in (50, 95, 99))
    print(f"{title:12} {numbers}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.demo", description=__doc__)
    for option, variable in _SERVERS.items():
        parser.add_argument(
            option, dest=variable, metavar="ADDRESS", help=f"use this server, as in {variable}"
        )
    parser.add_argument("--tokens", action="store_true", help="name the buyers by tokens")
    chosen = vars(parser.parse_args())
    tokens = chosen.pop("tokens")
    named = {variable: address for variable, address in chosen.items() if address}
    return demo(named, tokens=tokens)


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
