"""Checks the answers of the crowd against the ledger, and Redis against both."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import asyncpg

from dev.verdict import quiet
from flashsale import redis_client
from flashsale.keys import ItemKeys
from flashsale.nodes import Nodes
from flashsale.reservations import Record
from tests.faults.crowd import Answer, Crowd
from tests.faults.orders import Call, Shop
from tests.faults.redis_shards import RedisShards
from tests.faults.world import History, Sale, World
from tests.support.eventually import until
from tests.support.recorded import in_ledger, received
from tests.support.redis_users import of_tester

RECOVERY_SECONDS: Final = 120.0
UNPUBLISHED_SECONDS: Final = 2.0
"""How long an event may exist only in the pod's memory and in Redis while Kafka is up."""
RETRIES: Final = 30
_LAST: Final = 40
"""Lines of a log that explain the end of its process."""
EXPIRED_SECONDS: Final = 30.0
"""How long holds may stay open after everything was repaired."""


class Broken(Exception):
    """Promises were broken. Each argument describes one, with its lines of the journal."""


@dataclass
class Result:
    """The result of a schedule. Counts are reservations, except for `accepted_units`.

    `acknowledged` counts the calls of the order service that were answered 200. `lost` and
    `refused` reservations were answered 202 and are not recorded, which the durability
    of Redis allows. `confirmed`, `cancelled` and `expired` are of sales with holds.
    `recovery_seconds` count from the end of the last fault until both APIs answer.
    """

    answers: int = 0
    promised: int = 0
    acknowledged: int = 0
    accepted_units: int = 0
    lost: int = 0
    refused: int = 0
    confirmed: int = 0
    cancelled: int = 0
    expired: int = 0
    recovery_seconds: float = 0.0
    bystander: str = ""
    """The answers of a sale on another node of a cluster."""
    outcomes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"{self.answers} answers, {self.promised} reservations promised, {self.lost} lost, "
            f"{self.refused} refused, {self.confirmed} confirmed, {self.cancelled} cancelled, "
            f"{self.expired} expired, recovered after {self.recovery_seconds:.1f} s"
            + (f"; {self.bystander}" if self.bystander else "")
        )


async def await_recovery(world: World, crowd: Crowd, item: str) -> float:
    """Wait until both APIs answer. Returns the seconds. Raises Broken if they do not recover."""
    began = time.monotonic()
    deadline = began + RECOVERY_SECONDS
    for api in range(len(world.apis)):
        while True:
            user = f"late-{api}-{time.monotonic_ns()}"
            answer = await crowd.ask(api, user, f"key-{user}", 1)
            if answer.status in (202, 409):
                break
            if time.monotonic() > deadline:
                check_alive(world)
                raise Broken(
                    f"API {api + 1} does not sell {item} {RECOVERY_SECONDS:.0f} s after the last "
                    f"fault: {answer}\n{await _flash_sales(world)}"
                )
            await asyncio.sleep(0.2)
    return time.monotonic() - began


def check_alive(world: World) -> None:
    """Raise Broken if a process ended that was not killed. Here nothing restarts it."""
    for service in (*world.apis, *world.consumers, world.operator):
        if service.pid is None:
            log = service.log.read_text(errors="replace").splitlines()
            raise Broken(f"the process ended without being killed: {service.log}", *log[-_LAST:])


async def await_ready(world: World, sale: Sale) -> None:
    """Wait until the operator reports that the sale is as the FlashSale declares."""
    deadline = time.monotonic() + RECOVERY_SECONDS
    while True:
        done = await asyncio.to_thread(
            world.plane.kubectl, "get", "fs", sale.item, "-o", "json", check=True
        )
        live = json.loads(done.stdout)
        generation = live["metadata"]["generation"]
        reasons = {
            condition["reason"]
            for condition in live.get("status", {}).get("conditions", [])
            if condition["type"] == "Ready" and condition["observedGeneration"] == generation
        }
        # The stock can be below the units that buyers already hold, or change after the end.
        if reasons & {"Applied", "StockBelowHeld", "SaleEnded"}:
            return
        if time.monotonic() > deadline:
            raise Broken(f"the FlashSale is not ready: {await _flash_sales(world)}")
        await asyncio.sleep(0.5)


async def check(world: World, crowd: Crowd, shop: Shop, sale: Sale) -> Result:
    """Check every promise. Raises Broken with everything that is wrong."""
    await _without_holds(world, sale)
    await quiet(world.addresses, [sale.item])
    journal = tuple(crowd.journal)
    result = Result(answers=len(journal))
    result.outcomes = dict(
        Counter(f"{each.status} {each.kind}" if each.status != 202 else "202" for each in journal)
    )
    wrong = [
        f"an answer that no request may get: {answer}"
        for answer in journal
        if not _expected(answer, world.history)
    ]
    book = await _book(world, sale)
    wrong += _compare(book, journal, sale, world.history, result)
    if sale.hold_seconds:
        wrong += _orders(book, shop.journal, result)
    wrong += await _in_redis(world, sale, book)
    wrong += await _announced(world, sale)
    wrong += await _retries(world, crowd, book)
    audit = await _ctl(world, "audit", sale.item)
    if audit.returncode and not result.refused:
        wrong.append(f"flashsalectl audit: {audit.stdout}{audit.stderr}")
    if wrong:
        raise Broken(*wrong)
    return result


@dataclass(frozen=True, slots=True)
class _Book:
    """The ledger's contents: the counts of the sale, and its reservations by id."""

    accepted: int
    released: int
    held: int
    rows: dict[str, asyncpg.Record]


async def _book(world: World, sale: Sale) -> _Book:
    connection = await asyncpg.connect(world.postgres.url)
    try:
        counts = await connection.fetchrow("SELECT * FROM sales WHERE sale_id = $1", sale.sale_id)
        rows = await connection.fetch("SELECT * FROM reservations WHERE sale_id = $1", sale.sale_id)
    finally:
        await connection.close()
    if counts is None:
        raise Broken(f"the ledger has no row for {sale.sale_id}")
    return _Book(
        counts["accepted"],
        counts["released"],
        counts["held"],
        {str(row["reservation_id"]): row for row in rows},
    )


def _compare(
    book: _Book, journal: Sequence[Answer], sale: Sale, history: History, result: Result
) -> list[str]:
    """Check the ledger against the journal, and its counts against its rows."""
    wrong = []
    recorded = {i: row for i, row in book.rows.items() if row["state"] != "refused"}
    taken = [row for row in recorded.values() if row["state"] in ("held", "confirmed")]
    units = sum(row["quantity"] for row in taken)
    result.accepted_units = units
    if units > sale.highest_stock:
        wrong.append(f"{units} units are recorded, but at most {sale.highest_stock} were for sale")
    if units != book.accepted - book.released:
        wrong.append(f"the rows have {units} units, the sale has {book.accepted} - {book.released}")
    if book.held != sum(row["quantity"] for row in taken if row["state"] == "held"):
        wrong.append(f"the rows and the sale, {book.held}, have different numbers of held units")
    of_user: Counter[str] = Counter()
    for row in taken:
        of_user[row["user_id"]] += row["quantity"]
    wrong += [
        f"{user} has {units} units, but the limit is {sale.max_per_user}"
        for user, units in of_user.items()
        if units > sale.max_per_user
    ]
    promises: dict[str, list[Answer]] = defaultdict(list)
    keys: dict[tuple[str, str], set[str]] = defaultdict(set)
    for answer in journal:
        if answer.status == 202:
            promises[answer.reservation_id].append(answer)
            if answer.key:
                keys[answer.user, answer.key].add(answer.reservation_id)
    result.promised = len(promises)
    wrong += [
        f"{pair} got several reservations: {sorted(ids)}"
        for pair, ids in keys.items()
        if len(ids) > 1
    ]
    for identity, answers in promises.items():
        found = recorded.get(identity)
        if found is not None:
            if (found["user_id"], found["quantity"]) != (answers[0].user, answers[0].quantity):
                wrong.append(f"{answers[0]} is recorded as {dict(found)}")
        elif all(_may_be_lost(answer, history) for answer in answers):
            result.refused += identity in book.rows
            result.lost += identity not in book.rows
        else:
            state = "refused" if identity in book.rows else "not recorded"
            wrong.append(f"promised, but {state}:\n" + "\n".join(map(str, answers)))
    return wrong


def _orders(book: _Book, journal: Sequence[Call], result: Result) -> list[str]:
    """Check the shop's calls against the ledger. A change that was answered 200 is never lost."""
    wrong = []
    states = Counter(row["state"] for row in book.rows.values())
    result.confirmed, result.cancelled = states["confirmed"], states["cancelled"]
    result.expired = states["expired"]
    result.acknowledged = sum(call.status == 200 for call in journal)
    for call in journal:
        row = book.rows.get(call.reservation_id)
        state = "refused" if row is None else row["state"]
        match call.verb, call.status:
            case "confirm", 200:
                kept = row is not None and (state, row["order_ref"]) == (
                    "confirmed",
                    call.order_ref,
                )
            case "cancel", 200:
                kept = state in ("cancelled", "expired")
            case _, 409:
                kept = True
            case _, 404:
                kept = state == "refused"
            case _:
                kept = False
        if not kept:
            wrong.append(f"{call} is in the ledger as {row and dict(row)}")
    return wrong


async def _without_holds(world: World, sale: Sale) -> None:
    """Wait until Redis has no hold of the sale. Raises Broken if the holds do not expire."""
    client = redis_client.connect(world.addresses.redis_url)
    try:
        deadline = time.monotonic() + EXPIRED_SECONDS
        key = ItemKeys.of(sale.item).holds
        node = await Nodes.of_client(client).of(key)
        while left := await node.redis.zcard(key):
            if time.monotonic() > deadline:
                raise Broken(f"{left} holds of {sale.item} do not expire")
            await asyncio.sleep(0.2)
    finally:
        await client.aclose()


def _expected(answer: Answer, history: History) -> bool:
    if answer.impostor:
        # A sold-out sale is answered before the token is read.
        return answer.status in (0, 401, 403, 409, 503)
    if answer.status == 404:
        # To a pod that started after Redis lost the keys, a deleted sale is unknown.
        started = any(api == answer.api and at <= answer.received for api, at, _ in history.killed)
        lost = any(began <= answer.received for began, _ in history.lost_in_redis)
        return started and lost and any(at <= answer.received for at in history.deleted)
    return answer.status in (0, 202, 409, 503)


def _may_be_lost(answer: Answer, history: History) -> bool:
    """Return whether Redis lost the reservation and its pod died before Kafka could have it."""
    lost = any(end >= answer.sent for _, end in history.lost_in_redis)
    orphaned = any(
        api == answer.api
        and end >= answer.sent
        and (
            began <= answer.received + UNPUBLISHED_SECONDS
            or any(
                without_from <= answer.received + UNPUBLISHED_SECONDS and without_to + 15 >= began
                for without_from, without_to in history.without_kafka
            )
        )
        for api, began, end in history.orphaned
    )
    return lost and orphaned


async def _announced(world: World, sale: Sale) -> list[str]:
    """Check that a receiver of recorded reservations knows exactly the ledger's."""
    deadline = time.monotonic() + RECOVERY_SECONDS
    connection = await asyncpg.connect(world.postgres.url)
    try:
        recorded = await in_ledger(connection, sale.sale_id)
    finally:
        await connection.close()
    while True:
        view = await received(
            world.addresses.kafka_bootstrap, world.addresses.engine, sale.declared_at
        )
        known = {
            key: each for key, each in view.reservations.items() if each["saleId"] == sale.sale_id
        }
        if known == recorded:
            return []
        if time.monotonic() > deadline:
            differ = sorted(
                key for key in {*known, *recorded} if known.get(key) != recorded.get(key)
            )
            first = f"{known.get(differ[0])}, but the ledger has {recorded.get(differ[0])}"
            return [f"{len(differ)} reservations are announced differently, such as {first}"]
        await asyncio.sleep(0.5)


async def _in_redis(world: World, sale: Sale, book: _Book) -> list[str]:
    """Check Redis against the ledger, down to each reservation."""
    client = redis_client.connect(of_tester(world.addresses).redis_url)
    keys = ItemKeys.of(sale.item)
    try:
        node = await Nodes.of_client(client).of(keys.sale)
        pipeline = node.redis.pipeline(transaction=True)
        for key in (keys.sale, keys.reservations, keys.buyers):
            pipeline.hgetall(key)
        pipeline.xlen(keys.outbox)
        of_sale, reservations, buyers, outbox = await pipeline.execute()
    finally:
        await client.aclose()
    wrong = []
    counts = int(of_sale["accepted"]), int(of_sale["released"]), int(of_sale["held"]), outbox
    if counts != (book.accepted, book.released, book.held, 0):
        wrong.append(
            f"Redis has {counts} accepted, released, held and in its outbox. The ledger: {book}"
        )
    known = {
        i: (r.user_id, r.quantity, r.state, r.version, r.order_ref)
        for i, r in _records(reservations).items()
    }
    rows = {
        identity: (
            row["user_id"],
            row["quantity"],
            row["state"],
            row["version"],
            row["order_ref"] or "",
        )
        for identity, row in book.rows.items()
        if row["state"] != "refused"
    }
    wrong += [
        f"{identity} is {known.get(identity)} in Redis, {rows.get(identity)} in the ledger"
        for identity in known.keys() | rows.keys()
        if known.get(identity) != rows.get(identity)
    ]
    units: Counter[str] = Counter()
    for user, quantity, state, *_ in rows.values():
        units[user] += quantity * (state in ("held", "confirmed"))
    own = {user: int(text.partition(",")[0]) for user, text in buyers.items()}
    if {user: n for user, n in own.items() if n} != {user: n for user, n in units.items() if n}:
        wrong.append("Redis and the ledger have different buyers")
    return wrong


def _records(reservations: dict[str, str]) -> dict[str, Record]:
    return {identity: Record.parse(text) for identity, text in reservations.items()}


async def _retries(world: World, crowd: Crowd, book: _Book) -> list[str]:
    """Check that a repeated key still gets the same reservation."""
    keyed = [answer for answer in crowd.journal if answer.status == 202 and answer.key]
    wrong = []
    for answer in keyed[:: max(1, len(keyed) // RETRIES)]:
        row = book.rows.get(answer.reservation_id)
        if row is None or row["state"] == "refused":
            continue
        again = await _repeated(world, crowd, answer)
        ended = {"expired": "hold-expired", "cancelled": "cancelled"}.get(row["state"])
        if ended is not None and again.kind == ended:
            continue
        if again.reservation_id != answer.reservation_id:
            wrong.append(f"{answer} was repeated and got {again}")
    return wrong


async def _repeated(world: World, crowd: Crowd, answer: Answer) -> Answer:
    """Repeat a request. With a Redis Cluster, repeat it until it is decided.

    On a busy machine, the nodes of a cluster can miss each other once more after the schedule.
    """

    async def decided() -> Answer | None:
        again = await crowd.ask(1 - answer.api, answer.user, answer.key, answer.quantity)
        in_cluster = isinstance(world.redis, RedisShards)
        return None if in_cluster and again.status == 503 else again

    return await until(decided, f"{answer} is repeated and decided")


async def _ctl(world: World, *arguments: str) -> "subprocess.CompletedProcess[str]":
    def run() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [Path(sys.executable).with_name("flashsalectl"), *arguments],
            env={**os.environ, **world.addresses.environment()},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return await asyncio.to_thread(run)


async def _flash_sales(world: World) -> str:
    """Return the FlashSales with their status as YAML."""
    done = await asyncio.to_thread(world.plane.kubectl, "get", "fs", "-o", "yaml")
    return done.stdout + done.stderr
