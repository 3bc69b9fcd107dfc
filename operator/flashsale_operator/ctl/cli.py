"""The command group of `flashsalectl`, and the options and clients that its commands share."""

import asyncio
import sys
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import update_wrapper
from typing import Any, Final, TypeAlias, TypeVar

import asyncpg
import click
from click.shell_completion import CompletionItem

from flashsale import __version__, ledger, schema, settings
from flashsale.errors import FlashsaleError, LedgerUnavailable
from flashsale.inventory import Inventory
from flashsale.redis_client import MAX_CONNECTIONS, connect
from flashsale.settings import DatabaseUrl, EngineSettings, KafkaSettings, RedisUrl
from flashsale_operator.sales.reconciler import UnknownSale

Environ: TypeAlias = Mapping[str, str]
Command: TypeAlias = Callable[..., Coroutine[Any, Any, int]]
F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
R = TypeVar("R")

LACKS_MIGRATIONS: Final = (
    "the ledger lacks migrations: start a consumer or the operator of this version"
)
_NEWER: Final = "the ledger is of a newer version: use the flashsalectl of that version"
COMPLETION_SECONDS: Final = 1.0
"""How long the shell waits for the items that complete an argument."""


class Stores(EngineSettings, frozen=True):
    """Redis and the ledger."""

    redis_url: RedisUrl
    database_url: DatabaseUrl


class Servers(KafkaSettings, frozen=True):
    """Redis, the ledger and Kafka."""

    redis_url: RedisUrl
    database_url: DatabaseUrl


class _Ledger(EngineSettings, frozen=True):
    database_url: DatabaseUrl


@dataclass(frozen=True, slots=True)
class Clients:
    """The open clients of a command."""

    inventory: Inventory
    pool: ledger.Pool


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Servers: FLASHSALE_REDIS_URL, FLASHSALE_DATABASE_URL, FLASHSALE_KAFKA_BOOTSTRAP
and the other FLASHSALE_KAFKA_ variables, or the .local/env of `make up` in this
folder or above it. The environment wins.

\b
Exit codes: 0 success; 1 failure or disagreement; 2 wrong usage or settings.

\b
Examples:
  flashsalectl apply -f k8s/samples/iphone-15.yaml
  flashsalectl get
  flashsalectl get --help""",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def flashsalectl() -> None:
    """Applies, inspects and repairs flash sales, with or without Kubernetes."""


def command(*examples: str, name: str | None = None) -> Callable[[Command], click.Command]:
    """Adds a coroutine function as a command. Its docstring and the examples are its help.

    The command returns a coroutine, because click would handle the errors of a running one.
    """
    lines = "".join(f"\n  flashsalectl {example}" for example in examples)
    title = "Example" if len(examples) == 1 else "Examples"

    def add(function: Command) -> click.Command:
        @click.pass_context
        def begin(context: click.Context, /, **values: object) -> Coroutine[Any, Any, int]:
            running = function(context.obj, **values)

            async def within() -> int:
                with context.scope(cleanup=False):
                    return await running

            return within()

        update_wrapper(begin, function)  # with the options that click has attached to it
        added = flashsalectl.command(name or function.__name__, epilog=f"\b\n{title}:{lines}")
        return added(begin)

    return add


def item_argument(*, required: bool = True, nargs: int = 1) -> Callable[[F], F]:
    """The argument ITEM, which the shell completes with the ledger's items."""

    def readable(_: click.Context, __: click.Parameter, value: Any) -> Any:  # noqa: ANN401
        # An argument that is not UTF-8 names no item, and PostgreSQL refuses it. An empty one, such
        # as an unset variable of the shell, must not mean all items.
        if "" in (value if isinstance(value, tuple) else [value]):
            raise click.BadParameter("must not be empty")
        if isinstance(value, tuple):
            return tuple(map(_in_utf8, value))
        return None if value is None else _in_utf8(value)

    return click.argument(
        "items" if nargs != 1 else "item",
        metavar="ITEM..." if nargs != 1 else "ITEM" if required else "[ITEM]",
        required=required,
        nargs=nargs,
        shell_complete=_items,
        callback=readable,
    )


def output_option(*formats: str) -> Callable[[F], F]:
    """The option -o. Its default is the first format."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(formats),
        default=formats[0],
        show_default=True,
        help="The format of the output.",
    )


force_option = click.option("--force", is_flag=True, help="Even if a FlashSale declares the sale.")


@asynccontextmanager
async def connected(
    addresses: Stores | Servers, item: str | None = None, *, uses_ledger: bool = True
) -> AsyncIterator[Clients]:
    """Opens the clients. An `UnknownSale` of `item` gets the nearest item of the engine.

    Raises `LedgerUnavailable` if the ledger is of an earlier version. Only the consumer and the
    operator migrate it, because the processes of that version could not use it any more.
    """
    async with AsyncExitStack() as stack:
        redis = connect(addresses.redis_url)
        stack.push_async_callback(redis.aclose)
        pool = await ledger.connect(addresses.database_url)
        stack.callback(pool.terminate)
        clients = Clients(Inventory(redis, addresses.engine), pool)
        try:
            if uses_ledger:
                await schema.require_migrated(pool)
            yield clients
        except UnknownSale as error:
            near = None if item is None else await _nearest(clients, item)
            if near in (None, item):
                raise
            raise UnknownSale(f"{error}; did you mean {near}?") from None
        except LedgerUnavailable as error:
            if isinstance(error.__cause__, asyncpg.UndefinedTableError):
                raise LedgerUnavailable(LACKS_MIGRATIONS) from error
            if isinstance(error.__cause__, asyncpg.UndefinedColumnError | KeyError):
                raise LedgerUnavailable(_NEWER) from error
            raise


async def for_each(
    given: Sequence[T], call: Callable[[T], Awaitable[R]]
) -> list[R | FlashsaleError]:
    """Returns the result or the error of each call. One that fails does not end the others.

    Many run at once, because all rebuilds wait for the same pods and the same topic. With a
    thousand at once, most would time out waiting for a connection. If all fail with the same error,
    such as an outage, it is raised.
    """
    turns = asyncio.Semaphore(MAX_CONNECTIONS)

    async def one(each: T) -> R | FlashsaleError:
        async with turns:
            try:
                return await call(each)
            except FlashsaleError as error:
                return error

    results = await asyncio.gather(*map(one, given))
    errors = [result for result in results if isinstance(result, FlashsaleError)]
    if len(errors) == len(given) and len(set(map(str, errors))) == 1:
        raise errors[0]
    return results


async def _nearest(clients: Clients, wanted: str) -> str | None:
    """Returns the item that a person may have meant by an item or by the name of a sale."""
    try:
        rows = await ledger.sales(clients.pool)
        items = {item.lower(): item for item in await clients.inventory.index.items()}
    except FlashsaleError:
        return None  # an outage must not hide the error that needs a hint
    items |= {row.item_id.lower(): row.item_id for row in rows}
    names = {row.sale_id.partition("/")[2].lower(): row.item_id for row in rows}
    names |= {row.sale_id.lower(): row.item_id for row in rows}
    known = names | items
    found = get_close_matches(wanted.lower(), known, n=1)
    return known[found[0]] if found else None


def warn(text: str) -> None:
    """Prints a line to standard error, with the program's name."""
    print(f"flashsalectl: {text}", file=sys.stderr)


def no_such(item_id: str) -> str:
    return f"{item_id}: there is no sale of this item"


def _in_utf8(value: str) -> str:
    return value.encode("utf-8", "replace").decode()


def _items(context: click.Context, _: click.Parameter, begun: str) -> list[CompletionItem]:
    try:
        found = asyncio.run(_known_items(context.find_root().obj))
    except (FlashsaleError, TimeoutError):
        return []  # a completion must not disturb the command line
    return [CompletionItem(item) for item in found if item.startswith(begun)]


async def _known_items(environ: Environ) -> Iterable[str]:
    addresses = settings.load(_Ledger, environ)
    async with asyncio.timeout(COMPLETION_SECONDS):
        pool = await ledger.connect(addresses.database_url)
        try:
            return sorted({row.item_id for row in await ledger.sales(pool)})
        finally:
            pool.terminate()
