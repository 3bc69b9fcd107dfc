"""`flashsalectl`: apply, inspect and repair sales, with or without Kubernetes."""

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
from typing import Any, Final, TypeAlias

from flashsale import ledger, settings
from flashsale.errors import FlashsaleError, SettingsError
from flashsale.inventory import Inventory
from flashsale.ledger import SaleRow
from flashsale.redis_client import MAX_CONNECTIONS, connect
from flashsale.sale import Predecessor, SaleSpec
from flashsale.settings import DatabaseUrl, EngineSettings, KafkaSettings, RedisUrl
from flashsale_operator.ctl import tables
from flashsale_operator.sales import audit, manifest, offsets
from flashsale_operator.sales.decision import StillFenced, counted
from flashsale_operator.sales.drain import Drain
from flashsale_operator.sales.manifest import ManifestError
from flashsale_operator.sales.rebuild import Rebuilder, Rebuilt
from flashsale_operator.sales.reconciler import Reconciler, Result, UnknownSale, refuse_unsafe_redis
from flashsale_operator.sales.republish import republish

MAX_MANIFEST_BYTES: Final = 1024 * 1024


class _Stores(EngineSettings, frozen=True):
    redis_url: RedisUrl
    database_url: DatabaseUrl


class _All(KafkaSettings, frozen=True):
    redis_url: RedisUrl
    database_url: DatabaseUrl


@dataclass(frozen=True, slots=True)
class _Clients:
    inventory: Inventory
    pool: ledger.Pool


def main() -> None:
    """Runs the command line of the process and exits with its code."""
    sys.exit(run(sys.argv[1:], os.environ))


def run(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs a command line and returns its exit code."""
    options = _parser().parse_args(arguments)
    command, _ = _COMMANDS[options.command]
    # The clients also raise the errors that they log. Each error is printed once, below.
    for name in ("aiokafka", "asyncio", "asyncpg", "redis"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    try:
        return asyncio.run(command(options, environ))
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
        await refuse_unsafe_redis(clients.inventory)
        await ledger.migrate(clients.pool)
        reconciler = Reconciler(
            clients.inventory, clients.pool, _rebuilder(clients, addresses).rebuild
        )
        turns = asyncio.Semaphore(MAX_CONNECTIONS)

        async def reconcile(spec: SaleSpec) -> Result:
            # With a thousand reconciles at once, most would time out waiting for a connection.
            async with turns:
                return await reconciler.reconcile(spec)

        try:
            # Many at once, because all rebuilds wait for the same pods and the same topic.
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(reconcile(spec)) for spec in specs]
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        return max(_print_result(task.result()) for task in tasks)


async def _close(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    async with _connected(settings.load(_Stores, environ)) as clients:
        reconciler = Reconciler(clients.inventory, clients.pool, _never_rebuild)
        sale_ids = await reconciler.sales_to_close(options.item)
        return max([_print_result(await reconciler.close(sale_id)) for sale_id in sale_ids])


async def _rebuild(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    addresses = settings.load(_All, environ)
    async with _connected(addresses) as clients:
        await refuse_unsafe_redis(clients.inventory)
        rows = await ledger.sales(clients.pool, options.item)
        if not rows:
            raise UnknownSale(_no_such(options.item))
        # Prefer the sale that is not closed, because it has the item.
        row = min(rows, key=lambda row: row.closed)
        done = await _rebuilder(clients, addresses).rebuild(row)
    success = isinstance(done, Rebuilt)
    print(tables.line_of_rebuild(row.sale_id, done), file=sys.stdout if success else sys.stderr)
    return 0 if success else 1


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
        spans = partial(offsets.spans, addresses)
        found = await audit.audit(clients.inventory, clients.pool, spans, options.item)
    if options.item is not None and not found.findings:
        raise UnknownSale(_no_such(options.item))
    print(tables.of_audit(found))
    return 0 if found.agrees else 1


async def _republish(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    addresses = settings.load(_All, environ)
    async with _connected(addresses) as clients:
        published = await republish(clients.inventory, addresses, options.item)
    reservations = counted(published, "reservation")
    print(f"{options.item}: {reservations} published again; check with `flashsalectl audit`")
    return 0


async def _adopt_redis(_: argparse.Namespace, environ: Mapping[str, str]) -> int:
    async with _connected(settings.load(_Stores, environ)) as clients:
        await ledger.migrate(clients.pool)
        await clients.inventory.server()  # raises RedisUnavailable for a wrong address
        own = await ledger.engine_id(clients.pool, clients.inventory.engine)
        await clients.inventory.claim(own)
        address = clients.inventory.address
        former = await ledger.adopt_redis(clients.pool, address)
    if former in (None, address):
        print(f"the sales are in the Redis at {address}")
    else:
        print(f"the sales move from the Redis at {former} to {address}: the operator rebuilds them")
    return 0


_Command: TypeAlias = Callable[[argparse.Namespace, Mapping[str, str]], Coroutine[Any, Any, int]]
_COMMANDS: Final[dict[str, tuple[_Command, str]]] = {
    "apply": (_apply, "Make the ledger and Redis match FlashSale manifests. Repeats are safe."),
    "get": (_get, "Show the sales of one item, or all sales."),
    "close": (_close, "Close the sale of an item. Apply its manifest again to continue it."),
    "rebuild": (_rebuild, "Rebuild the fenced sale of an item in Redis from the ledger."),
    "audit": (_audit, "Check that Redis, outbox, Kafka and ledger agree. Exits with 1 if not."),
    "adopt-redis": (
        _adopt_redis,
        "Move the sales to another Redis. First stop the API pods that use the former one.",
    ),
    "republish": (_republish, "Publish an item's reservations from Redis to Kafka again."),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashsalectl",
        description="Applies, inspects and repairs flash sales, with or without Kubernetes.",
        epilog="All commands read FLASHSALE_REDIS_URL and FLASHSALE_DATABASE_URL. All but get and "
        "close also read FLASHSALE_KAFKA_BOOTSTRAP and FLASHSALE_KAFKA_TLS, _CA_FILE, _USER and "
        "_PASSWORD. Exit codes: 0 success; 1 failure or disagreement; 2 wrong usage or settings.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == "apply":
            command.add_argument(
                "-f",
                "--file",
                action="append",
                required=True,
                help="YAML file of FlashSales, or - for standard input; can be repeated",
            )
        elif name != "adopt-redis":
            nargs = "?" if name in ("get", "audit") else None
            command.add_argument("item", nargs=nargs, metavar="ITEM", help="itemId of the sale")
    return parser


def _specs(names: Sequence[str]) -> list[SaleSpec]:
    """Returns the sales of all files. Raises `ManifestError` with the mistakes of all files."""
    specs: dict[str, SaleSpec] = {}
    mistakes: list[str] = []
    for name in names:
        shown = "standard input" if name == "-" else name
        try:
            for spec in manifest.parse(_read(name)):
                if spec.sale_id in specs:
                    mistakes.append(f"{shown}: metadata.name: {spec.sale_id} appears twice")
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
            yield _Clients(Inventory(redis, addresses.engine), pool)
        finally:
            pool.terminate()
    finally:
        await redis.aclose()


def _rebuilder(clients: _Clients, addresses: _All) -> Rebuilder:
    spans = partial(offsets.spans, addresses)
    drain = Drain(clients.inventory, clients.pool, spans, progress=_progress)
    return Rebuilder(clients.inventory, clients.pool, drain, _progress)


async def _never_rebuild(row: SaleRow, _: Predecessor | None) -> Rebuilt | StillFenced:
    raise AssertionError(f"{row.sale_id}: a close never rebuilds")


def _print_result(result: Result) -> int:
    """Prints a line about a sale and returns the exit code for it."""
    print(tables.line_of(result), file=sys.stdout if result.ready else sys.stderr)
    return 0 if result.ready else 1


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"sale {line}", file=sys.stderr)


def _no_such(item_id: str) -> str:
    return f"{item_id}: there is no sale of this item"
