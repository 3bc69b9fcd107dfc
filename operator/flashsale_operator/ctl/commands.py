"""`flashsalectl`: sales without a cluster, and a look into those with one."""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import asyncpg
import msgspec
from redis.asyncio import Redis

from flashsale import ledger, settings
from flashsale.errors import FlashsaleError, SettingsError
from flashsale.inventory import Inventory
from flashsale.ledger import SaleRow
from flashsale.redis_client import MAX_CONNECTIONS, connect
from flashsale.sale import Predecessor, SaleSpec
from flashsale.settings import DatabaseUrl, KafkaSettings, RedisUrl
from flashsale_operator.ctl import tables
from flashsale_operator.sales import audit, manifest, offsets
from flashsale_operator.sales.decision import Kept
from flashsale_operator.sales.drain import Barrier
from flashsale_operator.sales.manifest import ManifestError
from flashsale_operator.sales.rebuild import Rebuild, Rebuilt
from flashsale_operator.sales.reconciler import Report, Steward, UnknownSale, refuse_eviction

MAX_MANIFEST_BYTES: Final = 1024 * 1024


class _Stores(msgspec.Struct, frozen=True):
    redis_url: RedisUrl
    database_url: DatabaseUrl


class _All(KafkaSettings, frozen=True):
    redis_url: RedisUrl
    database_url: DatabaseUrl


@dataclass(frozen=True, slots=True)
class _Clients:
    redis: "Redis"
    inventory: Inventory
    pool: "asyncpg.Pool[asyncpg.Record]"


def main() -> None:
    """Ends the process: 0 done, 1 not done and said why, 2 called or set up wrongly."""
    sys.exit(run(sys.argv[1:], os.environ))


def run(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """The exit code of a command line."""
    options = _parser().parse_args(arguments)
    # Clients log what they also raise, and what is raised is said once, at the end.
    for name in ("aiokafka", "asyncio", "asyncpg", "redis"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    try:
        return asyncio.run(_COMMANDS[options.command](options, environ))
    except FlashsaleError as error:
        for line in str(error).splitlines():
            print(f"flashsalectl: {line}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt:
        return 130


async def _apply(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    specs = _specs(options.file)
    addresses = settings.load(_All, environ)
    async with _connected(addresses) as clients:
        await refuse_eviction(clients.inventory)
        await ledger.migrate(clients.pool)
        steward = Steward(clients.inventory, clients.pool, _rebuilder(clients, addresses).rebuild)
        turns = asyncio.Semaphore(MAX_CONNECTIONS)

        async def reconcile(spec: SaleSpec) -> Report:
            # Of a thousand at once most would wait for a connection until that counts as an outage.
            async with turns:
                return await steward.reconcile(spec)

        try:
            # Many at once: what a rebuild waits for is the same for every sale.
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(reconcile(spec)) for spec in specs]
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        return max(_print_report(task.result()) for task in tasks)


async def _close(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    async with _connected(settings.load(_Stores, environ)) as clients:
        steward = Steward(clients.inventory, clients.pool, _never_rebuild)
        sale_ids = await steward.sales_to_close(options.item)
        return max([_print_report(await steward.close(sale_id)) for sale_id in sale_ids])


async def _rebuild(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    addresses = settings.load(_All, environ)
    async with _connected(addresses) as clients:
        await refuse_eviction(clients.inventory)
        rows = await ledger.sales(clients.pool, options.item)
        if not rows:
            raise UnknownSale(_no_such(options.item))
        # A sale that is closed has made room: the item is the other one's.
        row = min(rows, key=lambda row: row.closed)
        done = await _rebuilder(clients, addresses).rebuild(row)
    whole = isinstance(done, Rebuilt)
    print(tables.line_of_rebuild(row.sale_id, done), file=sys.stdout if whole else sys.stderr)
    return 0 if whole else 1


async def _get(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    async with _connected(settings.load(_Stores, environ)) as clients:
        rows = await ledger.sales(clients.pool, options.item)
        items = {row.item_id for row in rows}
        items.update([options.item] if options.item else await clients.inventory.items())
        server = await clients.inventory.server()
        held = await clients.inventory.sales(sorted(items))
    if not rows and not held:
        raise UnknownSale("there are no sales" if options.item is None else _no_such(options.item))
    print(tables.of_sales(rows, held, server))
    return 0


async def _audit(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    addresses = settings.load(_All, environ)
    async with _connected(addresses) as clients:
        found = await audit.audit(
            clients.inventory,
            clients.pool,
            partial(offsets.spans, addresses),
            options.item,
        )
    if options.item is not None and not found.findings:
        raise UnknownSale(_no_such(options.item))
    print(tables.of_audit(found))
    return 0 if found.agrees else 1


_COMMANDS: Final[
    dict[str, Callable[[argparse.Namespace, Mapping[str, str]], Coroutine[Any, Any, int]]]
] = {"apply": _apply, "get": _get, "close": _close, "rebuild": _rebuild, "audit": _audit}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashsalectl",
        description="Declares flash sales and looks into them, without a cluster or beside one.",
        epilog="Addresses come from FLASHSALE_REDIS_URL, FLASHSALE_DATABASE_URL and, for apply, "
        "rebuild and audit, FLASHSALE_KAFKA_BOOTSTRAP with _TLS, _CA_FILE, _USER "
        "and _PASSWORD. Exit codes: 0 done; 1 not done, or a disagreement; 2 wrong usage or "
        "settings.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    apply = _command(
        commands, "apply", "Makes ledger and Redis agree with FlashSale manifests; may be repeated."
    )
    apply.add_argument(
        "-f",
        "--file",
        action="append",
        required=True,
        help="a YAML file of one or more FlashSales, - for standard input; may be given again",
    )
    get = _command(commands, "get", "Shows the sales of an item, or all.")
    get.add_argument("item", nargs="?", metavar="ITEM", help="an itemId")
    close = _command(
        commands,
        "close",
        "Closes the sale of an item; applying its manifest again continues it.",
    )
    close.add_argument("item", metavar="ITEM", help="an itemId")
    rebuild = _command(
        commands,
        "rebuild",
        "Rebuilds the fenced sale of an item in Redis from the ledger; leaves a sale that is whole "
        "alone.",
    )
    rebuild.add_argument("item", metavar="ITEM", help="an itemId")
    check = _command(
        commands,
        "audit",
        "Compares Redis, outbox, Kafka and ledger; exits 1 on a difference that is not just work "
        "in flight.",
    )
    check.add_argument("item", nargs="?", metavar="ITEM", help="an itemId")
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, does: str
) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=does, description=does)


def _specs(names: Sequence[str]) -> list[SaleSpec]:
    """The sales of all files; raises `ManifestError` with the mistakes of all."""
    specs: dict[str, SaleSpec] = {}
    mistakes: list[str] = []
    for name in names:
        shown = "standard input" if name == "-" else name
        try:
            for spec in manifest.parse(_read(name)):
                if spec.sale_id in specs:
                    mistakes.append(f"{shown}: metadata.name: {spec.sale_id} is there twice")
                specs[spec.sale_id] = spec
        except ManifestError as error:
            mistakes += [f"{shown}: {mistake}" for mistake in error.mistakes]
    if mistakes:
        raise ManifestError(mistakes)
    return list(specs.values())


def _read(name: str) -> str:
    try:
        if name == "-":
            data = sys.stdin.buffer.read(MAX_MANIFEST_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                data = file.read(MAX_MANIFEST_BYTES + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a file name"
        raise ManifestError([f"cannot be read: {why}"]) from None
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(["cannot be read: larger than 1 MiB"])
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ManifestError(["cannot be read: not UTF-8"]) from None


@asynccontextmanager
async def _connected(addresses: _Stores | _All) -> AsyncIterator[_Clients]:
    redis = connect(addresses.redis_url)
    try:
        pool = await ledger.connect(addresses.database_url)
        try:
            yield _Clients(redis, Inventory(redis), pool)
        finally:
            pool.terminate()
    finally:
        await redis.aclose()


def _rebuilder(clients: _Clients, addresses: _All) -> Rebuild:
    barrier = Barrier(
        clients.redis,
        clients.pool,
        partial(offsets.spans, addresses),
        progress=_progress,
    )
    return Rebuild(clients.redis, clients.pool, barrier, _progress)


async def _never_rebuild(row: SaleRow, _: Predecessor | None) -> Rebuilt | Kept:
    raise AssertionError(f"closing {row.sale_id} rebuilds nothing")


def _print_report(report: Report) -> int:
    """Prints a line; returns the exit code that it means."""
    print(tables.line_of(report), file=sys.stdout if report.ready else sys.stderr)
    return 0 if report.ready else 1


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"sale {line}", file=sys.stderr)


def _no_such(item_id: str) -> str:
    return f"{item_id}: there is no sale of this item"


if __name__ == "__main__":
    main()  # in the image, which has no console scripts: python3 -m flashsale_operator.ctl.commands
