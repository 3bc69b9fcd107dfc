"""`python -m dev.demo`: 2,400 buyers, 100 phones, real servers, and every unit accounted for."""

import argparse
import asyncio
import os
import shutil
import sys
import time
from contextlib import ExitStack
from typing import Final

import uvloop

from dev.crowd import attempts, percentile, stampede
from dev.journal import Journal
from dev.local import API_PORT, apply_sample, start_stack
from dev.paths import LOCAL
from dev.services import ApiServer, ConsumerServer
from dev.stack.errors import StackError
from dev.stack.process import Server
from dev.verdict import judge, quiet

USERS: Final = 2_400
CONNECTIONS: Final = 100
ITEM: Final = "iphone_15"
SALE: Final = "default/iphone-15"


def demo() -> int:
    """Run the demonstration on fresh servers. Returns 0 only if every promise was kept."""
    data = LOCAL / "demo"
    shutil.rmtree(data, ignore_errors=True)
    print("Starting real servers (the first run downloads Kafka) …", flush=True)
    with ExitStack() as running:

        def started(server: Server) -> None:
            running.callback(server.stop)

        addresses = start_stack(data, os.environ, started)
        for service in (
            ConsumerServer(data / "consumer", addresses),
            ApiServer(data / "api", addresses),
        ):
            running.enter_context(service)
            print(f"  {service.name:9} on {service.url}", flush=True)
        apply_sample(addresses)
        wanted = attempts(ITEM, USERS, seed=15)
        print(f"{len(wanted):,} requests by {USERS:,} users …", flush=True)
        begun = time.perf_counter()
        journal = uvloop.run(stampede([service.url], wanted, connections=CONNECTIONS, tries=5))
        seconds = time.perf_counter() - begun
        print("Waiting until every event is in the ledger …", flush=True)
        asyncio.run(quiet(addresses, [ITEM]))
        verdict, recorded = asyncio.run(judge(addresses, SALE, journal))
    _report(journal, seconds, recorded)
    failed = [entry for entry in journal.entries if entry.status == 0 or entry.status >= 500]
    print(f"\n{verdict}")
    if failed:
        print(f"{len(failed)} requests failed. The first: {failed[0]}")
    shutil.rmtree(data, ignore_errors=True)
    print(f"""
Start the engine in the background with `make up`, then try:

  curl -X POST localhost:{API_PORT}/reserve -H "Content-Type: application/json" \\
    -d '{{"userId":"user1","itemId":"{ITEM}","quantity":1}}'""")
    sold_out = verdict.sold == verdict.allocated
    return 0 if verdict.kept and sold_out and not failed else 1


def _report(journal: Journal, seconds: float, recorded: dict[str, float]) -> None:
    entries = journal.entries
    print(
        f"\n{len(entries):,} requests in {seconds:.1f} s: {len(entries) / seconds:,.0f} RPS "
        f"over {CONNECTIONS} connections"
    )
    for (status, outcome), count in sorted(journal.outcomes().items()):
        print(f"  {status} {outcome:24} {count:>7,}")
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
    argparse.ArgumentParser(prog="python -m dev.demo", description=__doc__).parse_args()
    try:
        return demo()
    except StackError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
