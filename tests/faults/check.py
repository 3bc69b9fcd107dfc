"""Whether what the crowd was answered is what came of it."""

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
from flashsale.reservations import Record
from tests.faults.crowd import Answer, Crowd
from tests.faults.world import History, Sale, World

RECOVERY_SECONDS: Final = 120.0
UNPUBLISHED_SECONDS: Final = 2.0
"""How long an event may be in nothing but the pod's memory and Redis while Kafka answers."""
RETRIES: Final = 30


class Broken(Exception):
    """A promise was not kept; each of the arguments says one, with the journal's lines of it."""


@dataclass
class Result:
    """How a schedule ended. Counts are reservations but for `accepted_units`.

    `lost` and `refused` were answered 202 and are not recorded, as the durability allows;
    `recovery_seconds` from the last fault's end until both APIs answered again.
    """

    answers: int = 0
    promised: int = 0
    accepted_units: int = 0
    lost: int = 0
    refused: int = 0
    recovery_seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"{self.answers} answers, {self.promised} reservations promised, {self.lost} lost, "
            f"{self.refused} refused, answering again after {self.recovery_seconds:.1f} s"
        )


async def recovered(world: World, crowd: Crowd, item: str) -> float:
    """How long it took until both APIs answered by themselves."""
    began = time.monotonic()
    deadline = began + RECOVERY_SECONDS
    for api in range(len(world.apis)):
        while True:
            user = f"late-{api}-{time.monotonic_ns()}"
            answer = await crowd.ask(api, user, f"key-{user}", 1)
            if answer.status in (202, 409):
                break
            if time.monotonic() > deadline:
                raise Broken(
                    f"API {api + 1} does not sell {item} {RECOVERY_SECONDS:.0f} s after the last "
                    f"fault: {answer}\n{await _words(world)}"
                )
            await asyncio.sleep(0.2)
    return time.monotonic() - began


def alive(world: World) -> None:
    """Nothing that was not killed may have ended: only a pod would be started again."""
    for service in (*world.apis, *world.consumers, world.operator):
        if service.pid is None:
            raise Broken(f"it ended by itself: {service.log}")


async def declared(world: World, sale: Sale) -> None:
    """Waits until the operator says that everything is as the FlashSale asks."""
    deadline = time.monotonic() + RECOVERY_SECONDS
    while True:
        done = await asyncio.to_thread(
            world.plane.kubectl, "get", "fs", sale.item, "-o", "json", check=True
        )
        live = json.loads(done.stdout)
        generation = live["metadata"]["generation"]
        told = {
            condition["reason"]
            for condition in live.get("status", {}).get("conditions", [])
            if condition["type"] == "Ready" and condition["observedGeneration"] == generation
        }
        # Less stock than buyers hold already is all that can be wrong with it.
        if told & {"Applied", "StockBelowHeld"}:
            return
        if time.monotonic() > deadline:
            raise Broken(f"the FlashSale is not ready: {await _words(world)}")
        await asyncio.sleep(0.5)


async def check(world: World, crowd: Crowd, sale: Sale) -> Result:
    """Raises `Broken` with everything that is wrong."""
    await quiet(world.addresses, [sale.item])
    journal = tuple(crowd.journal)
    result = Result(answers=len(journal))
    result.outcomes.update(f"{answer.status} {answer.kind}" for answer in journal)
    wrong = [
        f"an answer that nobody may get: {answer}"
        for answer in journal
        if not _expected(answer, world.history)
    ]
    book = await _book(world, sale)
    wrong += _compare(book, journal, sale, world.history, result)
    wrong += await _in_redis(world, sale, book)
    wrong += await _retries(crowd, book)
    audit = await _ctl(world, "audit", sale.item)
    if audit.returncode and not result.refused:
        wrong.append(f"flashsalectl audit: {audit.stdout}{audit.stderr}")
    if wrong:
        raise Broken(*wrong)
    return result


@dataclass(frozen=True, slots=True)
class _Book:
    """The ledger: the sale's counts, and its reservations by id."""

    accepted: int
    released: int
    rows: dict[str, asyncpg.Record]


async def _book(world: World, sale: Sale) -> _Book:
    connection = await asyncpg.connect(world.postgres.url)
    try:
        counts = await connection.fetchrow("SELECT * FROM sales WHERE sale_id = $1", sale.sale_id)
        rows = await connection.fetch("SELECT * FROM reservations WHERE sale_id = $1", sale.sale_id)
    finally:
        await connection.close()
    if counts is None:
        raise Broken(f"the ledger has no row of {sale.sale_id}")
    return _Book(
        counts["accepted"], counts["released"], {str(row["reservation_id"]): row for row in rows}
    )


def _compare(
    book: _Book, journal: Sequence[Answer], sale: Sale, history: History, result: Result
) -> list[str]:
    """The ledger against the journal and against itself."""
    wrong = []
    recorded = {i: row for i, row in book.rows.items() if row["state"] == "accepted"}
    units = sum(row["quantity"] for row in recorded.values())
    result.accepted_units = units
    if units > sale.most:
        wrong.append(f"{units} units are recorded and at most {sale.most} were for sale")
    if units != book.accepted - book.released:
        wrong.append(f"the rows have {units} units, the sale {book.accepted} less {book.released}")
    held: Counter[str] = Counter()
    for row in recorded.values():
        held[row["user_id"]] += row["quantity"]
    wrong += [
        f"{user} holds {units} units and may hold {sale.max_per_user}"
        for user, units in held.items()
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
    wrong += [f"{pair} was given {sorted(ids)}" for pair, ids in keys.items() if len(ids) > 1]
    for identity, answers in promises.items():
        found = recorded.get(identity)
        if found is not None:
            if (found["user_id"], found["quantity"]) != (answers[0].user, answers[0].quantity):
                wrong.append(f"{answers[0]} is recorded as {dict(found)}")
        elif all(_may_be_lost(answer, history) for answer in answers):
            result.refused += identity in book.rows
            result.lost += identity not in book.rows
        else:
            what = "refused" if identity in book.rows else "not recorded"
            wrong.append(f"was promised and is {what}:\n" + "\n".join(map(str, answers)))
    return wrong


def _expected(answer: Answer, history: History) -> bool:
    if answer.status == 404:
        # A pod that has started since Redis lost the keys has never seen the sale, and knows no
        # better until the operator has put a marker there.
        started = any(api == answer.api and to <= answer.received for api, _, to in history.killed)
        return started and any(began <= answer.received for began, _ in history.lost_in_redis)
    return answer.status in (0, 202, 409, 503)


def _may_be_lost(answer: Answer, history: History) -> bool:
    """Whether Redis lost it and the pod that answered was gone before Kafka can have had it."""
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


async def _in_redis(world: World, sale: Sale, book: _Book) -> list[str]:
    """Redis against the ledger, to the last reservation."""
    client, keys = redis_client.connect(world.addresses.redis_url), ItemKeys.of(sale.item)
    try:
        pipeline = client.pipeline(transaction=True)
        for key in (keys.sale, keys.reservations, keys.buyers):
            pipeline.hgetall(key)
        pipeline.xlen(keys.outbox)
        of_sale, reservations, buyers, outbox = await pipeline.execute()
    finally:
        await client.aclose()
    wrong = []
    counts = int(of_sale["accepted"]), int(of_sale["released"]), outbox
    if counts != (book.accepted, book.released, 0):
        wrong.append(f"Redis has {counts} accepted, released, in its outbox: the ledger {book}")
    known = {i: (r.user_id, r.quantity) for i, r in _records(reservations).items()}
    rows = {
        identity: (row["user_id"], row["quantity"])
        for identity, row in book.rows.items()
        if row["state"] != "refused"
    }
    wrong += [
        f"{identity} is {known.get(identity)} in Redis, {rows.get(identity)} in the ledger"
        for identity in known.keys() | rows.keys()
        if known.get(identity) != rows.get(identity)
    ]
    held: Counter[str] = Counter()
    for user, quantity in rows.values():
        held[user] += quantity
    if {user: int(units) for user, units in buyers.items() if int(units)} != dict(held):
        wrong.append("Redis and ledger have other buyers")
    return wrong


def _records(reservations: dict[str, str]) -> dict[str, Record]:
    return {identity: Record.parse(text) for identity, text in reservations.items()}


async def _retries(crowd: Crowd, book: _Book) -> list[str]:
    """The same key is still the same reservation."""
    keyed = [answer for answer in crowd.journal if answer.status == 202 and answer.key]
    wrong = []
    for answer in keyed[:: max(1, len(keyed) // RETRIES)]:
        row = book.rows.get(answer.reservation_id)
        if row is None or row["state"] == "refused":
            continue
        again = await crowd.ask(1 - answer.api, answer.user, answer.key, answer.quantity)
        if again.reservation_id != answer.reservation_id:
            wrong.append(f"{answer} was asked again and answered {again}")
    return wrong


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


async def _words(world: World) -> str:
    """What the FlashSales say."""
    done = await asyncio.to_thread(world.plane.kubectl, "get", "fs", "-o", "yaml")
    return done.stdout + done.stderr
