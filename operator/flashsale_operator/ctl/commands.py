"""`flashsalectl`: apply, inspect and repair sales, with or without Kubernetes."""

import asyncio
import errno
import logging
import os
import sys
from collections.abc import Coroutine, Mapping, Sequence
from collections.abc import Set as AbstractSet
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Final, cast

import click
from click.shell_completion import get_completion_class

from flashsale import kafka_clients, ledger, requirements, schema, settings
from flashsale.errors import FlashsaleError, SettingsError
from flashsale.inventory import Freed
from flashsale.ledger import SaleRow
from flashsale.requirements import Checks
from flashsale.sale import SaleSpec
from flashsale_operator.ctl import files, local_env, queries, redis_cluster, size, tables
from flashsale_operator.ctl.cli import (
    Clients,
    Environ,
    Servers,
    Stores,
    command,
    connected,
    flashsalectl,
    for_each,
    force_option,
    item_argument,
    warn,
)
from flashsale_operator.ctl.repairs import rebuilder_of
from flashsale_operator.sales import engine
from flashsale_operator.sales.decision import counted, needs_rebuild
from flashsale_operator.sales.manifest import ManifestError
from flashsale_operator.sales.reconciler import Reconciler, Result

__all__ = ["main", "queries", "redis_cluster", "run", "size"]  # an import of commands adds them

DELETE_LOOKS: Final = 100
DELETE_BETWEEN_SECONDS: Final = 0.2
"""How often `delete` looks whether the ledger has recorded the sale: for 20 seconds."""

_WRITE_ERRORS: Final = frozenset(
    {errno.EAGAIN, errno.EBADF, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPIPE}
)
"""Errors of a write to a file or a pipe. Errors of a network have other numbers."""


class HasFlashSale(FlashsaleError):
    """The sale is declared by a FlashSale, and is changed with kubectl."""


def main() -> None:
    """Runs the command line of the process and exits with its code."""
    if sys.stdout is None:  # after `>&-`
        warn("the output cannot be written: it is closed")
        sys.exit(1)
    # As kubectl, whatever the locale is. The name of a file can have bytes that are not UTF-8.
    cast("TextIOWrapper", sys.stdout).reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        folder = Path.cwd()
    except OSError:  # it was removed
        folder = Path("/")
    sys.exit(run(sys.argv[1:], *local_env.environment(os.environ, folder)))


def run(arguments: Sequence[str], environ: Mapping[str, str], servers: str = "") -> int:
    """Runs a command line and returns its exit code.

    `servers` is a sentence about the origin of the addresses, for errors.
    """
    try:
        code = _run(arguments, environ, servers)
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in _WRITE_ERRORS:
            raise
        # Python must not flush the rest when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # of a reader, such as `head`, that has enough
            warn(f"the output cannot be written: {error.strerror}")
        return 1
    return code


def _run(arguments: Sequence[str], environ: Mapping[str, str], servers: str) -> int:
    # The clients also raise the errors that they log. Each error is printed once, below.
    for name in ("aiokafka", "asyncio", "asyncpg", "redis"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    kafka_clients.adapt_aiokafka()
    try:
        chosen = flashsalectl.main(
            list(arguments), "flashsalectl", obj=environ, standalone_mode=False
        )
        return asyncio.run(chosen) if asyncio.iscoroutine(chosen) else int(chosen or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except FlashsaleError as error:
        lines = str(error).splitlines()
        if servers and not isinstance(error, ManifestError | files.NotWritten):
            lines.append(servers)
        for line in lines:
            warn(line)
        return 2 if isinstance(error, SettingsError) else 1
    except (KeyboardInterrupt, click.Abort):
        return 130


@command("apply -f k8s/samples/iphone-15.yaml", "apply -f sales/", "apply -f - < sales.yaml")
@force_option
@click.option(
    "-f",
    "--file",
    "names",
    multiple=True,
    required=True,
    metavar="FILE",
    type=click.Path(),
    help="A YAML or JSON file of FlashSales, a directory of such files, or - for standard input. "
    "Can be repeated.",
)
def apply(environ: Environ, names: Sequence[str], *, force: bool) -> Coroutine[Any, Any, int]:
    """Make the ledger and Redis match FlashSale manifests. Repeats are safe."""
    # The files are read before the event loop runs, which would delay Ctrl-C until the end.
    return _apply(environ, files.sales(names), force=force)


async def _apply(environ: Environ, specs: Sequence[SaleSpec], *, force: bool) -> int:
    addresses = settings.load(Servers, environ)
    async with connected(addresses) as clients:
        checks = Checks()
        checks.require(requirements.LEDGER, await schema.facts(clients.pool))
        await engine.require_redis(checks, clients.inventory)
        await schema.migrate(clients.pool, clients.inventory.engine)
        sale_ids = [spec.sale_id for spec in specs]
        await _check_declared(clients, "apply -f FILE", set(sale_ids), force=force)
        reconciler = Reconciler(
            clients.inventory, clients.pool, rebuilder_of(clients, addresses).rebuild
        )
        results = await for_each(specs, reconciler.reconcile)
    return max(map(_print_result, sale_ids, results))


@command("close iphone_15")
@force_option
@item_argument()
async def close(environ: Environ, item: str, *, force: bool) -> int:
    """Close the sale of an item. Apply its manifest again to continue it."""
    async with connected(settings.load(Stores, environ), item) as clients:
        reconciler = Reconciler(clients.inventory, clients.pool)
        sale_ids = await reconciler.sales_to_close(item)
        await _check_declared(clients, "delete flashsale", set(sale_ids), force=force)
        return max([_print_result(each, await reconciler.close(each)) for each in sale_ids])


async def _check_declared(
    clients: Clients, kubectl: str, sale_ids: AbstractSet[str], *, force: bool
) -> None:
    """Raises `HasFlashSale` if the operator would undo a change of one of the sales.

    With `force`, a warning is printed instead.
    """
    declared = [
        row.sale_id
        for row in await ledger.sales(clients.pool)
        if row.sale_id in sale_ids and row.resource_uid is not None and not row.closed
    ]
    if declared:
        namespace, _, name = declared[0].partition("/")
        target = "" if kubectl.startswith("apply") else f" {name}"
        command = f"kubectl -n {namespace} {kubectl}{target}"
        sales = " and ".join(declared)
        if not force:
            raise HasFlashSale(
                f"{sales}: a FlashSale declares the sale, and the operator would undo this change. "
                f"Run `{command}`, or add --force while no operator runs"
            )
        warn(
            f"{sales}: a FlashSale declares the sale, and the next operator undoes this change. "
            f"Before that, also run `{command}`"
        )


@command("delete iphone_15")
@force_option
@item_argument()
async def delete(environ: Environ, item: str, *, force: bool) -> int:
    """Close the sale of an item, and free its keys in Redis. The ledger keeps it."""
    addresses = settings.load(Stores, environ)
    async with connected(addresses, item) as clients:
        reconciler = Reconciler(clients.inventory, clients.pool)
        engine_id = await ledger.engine_id(clients.pool, addresses.engine)
        sale_ids = await reconciler.sales_to_close(item)
        await _check_declared(clients, "delete flashsale", set(sale_ids), force=force)
        code = 0
        for sale_id in sale_ids:
            await reconciler.close(sale_id)
            freed, obstacle = await _free(clients, reconciler, sale_id, engine_id)
            left = freed not in (Freed.FREED, Freed.UNKNOWN)
            line = tables.line_of_delete(sale_id, freed, obstacle)
            print(line, file=sys.stderr if left else sys.stdout)
            code |= left
    return code


async def _free(
    clients: Clients, reconciler: Reconciler, sale_id: str, engine_id: str
) -> tuple[Freed, str]:
    """Frees the keys of a closed sale, once the ledger has recorded it completely.

    The second value says why no wait would free them, or is empty.
    """
    for _ in range(DELETE_LOOKS):
        row = await ledger.sale(clients.pool, sale_id)
        if row is None:
            return Freed.UNKNOWN, ""
        if not row.held:  # free.lua compares the other two counts
            freed = await clients.inventory.free(
                row.item_id,
                sale_id,
                row.revision,
                accepted=row.accepted,
                released=row.released,
                engine_id=engine_id,
            )
            if freed is not Freed.UNRECORDED:
                return freed, ""
        if obstacle := await _obstacle(clients, reconciler, row):
            return Freed.UNRECORDED, obstacle
        await asyncio.sleep(DELETE_BETWEEN_SECONDS)
    return Freed.UNRECORDED, ""


async def _obstacle(clients: Clients, reconciler: Reconciler, row: SaleRow) -> str:
    """Returns why the keys of a closed sale stay until a person acts, or an empty text."""
    sale, server = await clients.inventory.observe(row.item_id)
    if needs_rebuild(row, sale, server):
        return tables.LOST_KEYS.format(item=row.item_id)
    if sale is None or sale.sale_id != row.sale_id:
        return ""
    if sale.held:
        return tables.OPEN_HOLDS.format(units=counted(sale.held, "unit"))
    refused = await reconciler.refused(row.sale_id)
    if not refused.units or sale.outbox_length or sale.accepted - row.accepted != refused.units:
        return ""
    return tables.REFUSED.format(reservations=counted(refused.reservations, "reservation"))


@flashsalectl.command(
    epilog="\b\nExamples:\n  source <(flashsalectl completion bash)\n"
    "  flashsalectl completion fish | source"
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print the completion script of a shell.

    It completes commands, options and items.
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise AssertionError(f"click has no completion for {shell}")
    print(kind(flashsalectl, {}, "flashsalectl", "_FLASHSALECTL_COMPLETE").source())
    return 0


def _print_result(sale_id: str, result: Result | FlashsaleError) -> int:
    """Prints a line about a sale and returns the exit code for it."""
    ready = isinstance(result, Result) and result.ready
    line = tables.line_of(result) if isinstance(result, Result) else f"sale {sale_id}: {result}"
    print(line, file=sys.stdout if ready else sys.stderr)
    return 0 if ready else 1
