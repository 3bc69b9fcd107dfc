"""`flashsalectl`: apply, inspect and repair sales, with or without Kubernetes."""

import argparse
import asyncio
import logging
import os
import re
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

from flashsale import ledger, settings
from flashsale.errors import FlashsaleError, SettingsError
from flashsale.fields import USER_ID_PATTERN, UUID_PATTERN
from flashsale.inventory import Freed, Inventory
from flashsale.ledger import SaleRow
from flashsale.redis_client import MAX_CONNECTIONS, connect
from flashsale.requirements import Checks
from flashsale.reservations import Call
from flashsale.sale import Predecessor, SaleSpec, SaleState
from flashsale.settings import DatabaseUrl, EngineSettings, KafkaSettings, RedisUrl
from flashsale_operator.ctl import doctor, files, reservations, tables
from flashsale_operator.sales import audit, engine, offsets, transitions
from flashsale_operator.sales.decision import StillFenced, counted, state_of
from flashsale_operator.sales.drain import Drain
from flashsale_operator.sales.rebuild import Rebuilder, Rebuilt
from flashsale_operator.sales.reconciler import Reconciler, Result, UnknownSale
from flashsale_operator.sales.republish import republish

DELETE_LOOKS: Final = 100
DELETE_BETWEEN_SECONDS: Final = 0.2
"""How often `delete` looks whether the ledger has recorded the sale: for 20 seconds."""


class _Stores(EngineSettings, frozen=True):
    redis_url: RedisUrl
    database_url: DatabaseUrl


class _All(KafkaSettings, frozen=True):
    redis_url: RedisUrl
    database_url: DatabaseUrl


class HasFlashSale(FlashsaleError):
    """The sale is declared by a FlashSale, and is changed with kubectl."""


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
    except BrokenPipeError:
        # The reader, such as `head`, has read enough. Python must not flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


async def _apply(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    specs = files.sales(options.file)
    addresses = settings.load(_All, environ)
    async with _connected(addresses) as clients:
        await engine.require_servers(Checks(), clients.inventory, clients.pool)
        await ledger.migrate(clients.pool)
        if not options.force:
            await _refuse_declared(clients, "apply -f FILE", {spec.sale_id for spec in specs})
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
        if not options.force:
            await _refuse_declared(clients, "delete flashsale", set(sale_ids))
        return max([_print_result(await reconciler.close(sale_id)) for sale_id in sale_ids])


async def _refuse_declared(clients: _Clients, kubectl: str, sale_ids: AbstractSet[str]) -> None:
    """Raises `HasFlashSale` if the operator would undo a change of one of the sales."""
    declared = [
        row.sale_id
        for row in await ledger.sales(clients.pool)
        if row.sale_id in sale_ids and row.resource_uid is not None and not row.closed
    ]
    if declared:
        namespace, _, name = declared[0].partition("/")
        target = "" if kubectl.startswith("apply") else f" {name}"
        raise HasFlashSale(
            f"{' and '.join(declared)}: a FlashSale declares the sale, and the operator would undo "
            f"this change. Run `kubectl -n {namespace} {kubectl}{target}`, or add --force while no "
            "operator runs"
        )


async def _rebuild(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    addresses = settings.load(_All, environ)
    async with _connected(addresses) as clients:
        await engine.require_redis(Checks(), clients.inventory)
        rows = await ledger.sales(clients.pool, options.item)
        if options.item is None:
            chosen = await _fenced(clients, rows)
        elif rows:
            # Prefer the sale that is not closed, because it has the item. Then one with open holds.
            chosen = [min(rows, key=lambda row: (row.closed, not row.held))]
        else:
            raise UnknownSale(_no_such(options.item))
        rebuilder = _rebuilder(clients, addresses)
        # Many at once, because all rebuilds wait for the same pods and the same topic.
        done = await asyncio.gather(*(rebuilder.rebuild(row) for row in chosen))
    for row, result in zip(chosen, done, strict=True):
        line = tables.line_of_rebuild(row.sale_id, result)
        print(line, file=sys.stdout if isinstance(result, Rebuilt) else sys.stderr)
    return 0 if all(isinstance(result, Rebuilt) for result in done) else 1


async def _fenced(clients: _Clients, rows: Sequence[SaleRow]) -> list[SaleRow]:
    """Returns the fenced sales of rows that are not closed, or closed with open holds."""
    server = await clients.inventory.server()
    held = await clients.inventory.sales({row.item_id for row in rows})
    return [
        row
        for row in rows
        if (not row.closed or row.held)
        and state_of(row, held.get(row.item_id), server) is SaleState.FENCED
    ]


async def _delete(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    addresses = settings.load(_Stores, environ)
    async with _connected(addresses) as clients:
        reconciler = Reconciler(clients.inventory, clients.pool, _never_rebuild)
        engine_id = await ledger.engine_id(clients.pool, addresses.engine)
        sale_ids = await reconciler.sales_to_close(options.item)
        if not options.force:
            await _refuse_declared(clients, "delete flashsale", set(sale_ids))
        code = 0
        for sale_id in sale_ids:
            await reconciler.close(sale_id)
            freed = await _free(clients, sale_id, engine_id)
            code |= freed is Freed.UNRECORDED
            print(tables.line_of_delete(sale_id, freed), file=sys.stderr if code else sys.stdout)
    return code


async def _free(clients: _Clients, sale_id: str, engine_id: str) -> Freed:
    """Frees the keys of a closed sale, once the ledger has recorded it completely."""
    for _ in range(DELETE_LOOKS):
        row = await ledger.sale(clients.pool, sale_id)
        if row is None:
            return Freed.UNKNOWN
        freed = await clients.inventory.free(
            row.item_id,
            sale_id,
            row.revision,
            accepted=row.accepted,
            released=row.released,
            engine_id=engine_id,
        )
        if freed is not Freed.UNRECORDED:
            return freed
        await asyncio.sleep(DELETE_BETWEEN_SECONDS)
    return freed


async def _get(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    async with _connected(settings.load(_Stores, environ)) as clients:
        rows = await ledger.sales(clients.pool, options.item)
        items = {row.item_id for row in rows}
        items.update([options.item] if options.item else await clients.inventory.items())
        server = await clients.inventory.server()
        held = await clients.inventory.sales(sorted(items))
    if options.item is None and not options.all:
        present = {sale.sale_id for sale in held.values()}
        rows = [row for row in rows if not row.closed or row.sale_id in present]
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
    done = f"{counted(published, 'reservation')} published again"
    print(f"{options.item}: {done}; check with `flashsalectl audit`")
    return 0


async def _reservations(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    async with _connected(settings.load(_Stores, environ)) as clients:
        if not await ledger.sales(clients.pool, options.item):
            raise UnknownSale(_no_such(options.item))
        write = reservations.WRITERS[options.output](sys.stdout)
        async with aclosing(reservations.pages(clients.pool, options.item)) as pages:
            async for page in pages:
                write.page(page)
        write.end()
        sys.stdout.flush()
    return 0


async def _change(
    verb: transitions.Verb, options: argparse.Namespace, environ: Mapping[str, str]
) -> int:
    addresses = settings.load(_All, environ)
    async with _connected(addresses) as clients:
        outcome = await transitions.change(
            clients.inventory,
            addresses,
            options.item,
            verb,
            Call(options.reservation, options.order_ref or ""),
            engine_id=await engine.engine_id(clients.inventory, clients.pool),
        )
    line, success = tables.line_of_change(options.reservation, verb, outcome, options.order_ref)
    print(line, file=sys.stdout if success else sys.stderr)
    return 0 if success else 1


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


async def _doctor(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    addresses = settings.load(_All, environ)
    found = await doctor.examine(addresses, addresses.redis_url, addresses.database_url, environ)
    print(tables.of_findings(found) if options.output == "table" else tables.json_of(found))
    return 1 if any(finding.verdict == "failure" for finding in found) else 0


_Command: TypeAlias = Callable[[argparse.Namespace, Mapping[str, str]], Coroutine[Any, Any, int]]
_COMMANDS: Final[dict[str, tuple[_Command, str]]] = {
    "apply": (_apply, "Make the ledger and Redis match FlashSale manifests. Repeats are safe."),
    "get": (_get, "Show the sales of one item, or all that have keys in Redis."),
    "close": (_close, "Close the sale of an item. Apply its manifest again to continue it."),
    "delete": (
        _delete,
        "Close the sale of an item, and free its keys in Redis. The ledger keeps it.",
    ),
    "rebuild": (_rebuild, "Rebuild the fenced sale of an item, or all, in Redis from the ledger."),
    "audit": (_audit, "Check that Redis, outbox, Kafka and ledger agree. Exits with 1 if not."),
    "adopt-redis": (
        _adopt_redis,
        "Move the sales to another Redis. First stop the API pods that use the former one.",
    ),
    "doctor": (
        _doctor,
        "Check Redis, Kafka, PostgreSQL and the cluster from here. Exits with 1 on a failure.",
    ),
    "republish": (_republish, "Publish an item's reservations from Redis to Kafka again."),
    "reservations": (_reservations, "Show the reservations of an item in the ledger."),
    "confirm": (
        partial(_change, "confirm"),
        "Confirm a reservation for an order, if the shop cannot. Repeats are safe.",
    ),
    "cancel": (
        partial(_change, "cancel"),
        "Cancel a reservation, if the shop cannot. A confirmed one needs its order reference.",
    ),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashsalectl",
        description="Applies, inspects and repairs flash sales, with or without Kubernetes.",
        epilog="All commands read FLASHSALE_REDIS_URL and FLASHSALE_DATABASE_URL. All but get, "
        "close and reservations also read FLASHSALE_KAFKA_BOOTSTRAP and FLASHSALE_KAFKA_TLS, "
        "_CA_FILE, _USER and _PASSWORD. Exit codes: 0 success; 1 failure or disagreement; 2 wrong "
        "usage or settings.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in ("apply", "close", "delete"):
            command.add_argument(
                "--force", action="store_true", help="even if a FlashSale declares the sale"
            )
        if name == "apply":
            command.add_argument(
                "-f",
                "--file",
                action="append",
                required=True,
                metavar="FILE",
                help="YAML or JSON file of FlashSales, a directory of such files, or - for "
                "standard input; can be repeated",
            )
        elif name == "doctor":
            command.add_argument(
                "-o",
                "--output",
                choices=["table", "json"],
                default="table",
                help="the form of the output (default table)",
            )
        elif name == "rebuild":
            which = command.add_mutually_exclusive_group(required=True)
            which.add_argument("item", nargs="?", metavar="ITEM", help="itemId of the sale")
            which.add_argument("--all", action="store_true", help="every fenced sale")
        elif name != "adopt-redis":
            nargs = "?" if name in ("get", "audit") else None
            command.add_argument("item", nargs=nargs, metavar="ITEM", help="itemId of the sale")
            if name == "get":
                command.add_argument(
                    "--all", action="store_true", help="also closed sales whose keys are freed"
                )
        if name == "reservations":
            command.add_argument(
                "-o",
                "--output",
                choices=reservations.WRITERS,
                default="table",
                help="format of the output (default table)",
            )
        elif name in ("confirm", "cancel"):
            command.add_argument(
                "reservation", metavar="RESERVATION", type=_reservation_id, help="reservation id"
            )
            command.add_argument(
                "--order-ref",
                required=name == "confirm",
                metavar="REF",
                type=_order_ref,
                help="the shop's reference of the order",
            )
    return parser


def _reservation_id(text: str) -> str:
    if re.match(UUID_PATTERN, text) is None:
        raise argparse.ArgumentTypeError("must be a UUID in lower case")
    return text


def _order_ref(text: str) -> str:
    if re.match(USER_ID_PATTERN, text) is None:
        raise argparse.ArgumentTypeError(
            "must be 1 to 128 of the characters A-Z a-z 0-9 . _ ~ @ : | + = -"
        )
    return text


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
