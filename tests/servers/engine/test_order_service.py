"""The example of an order service, on a whole engine. Its decisions must agree with the ledger."""

import asyncio
import json
import os
import subprocess
import sys
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from dev.services import Addresses, ApiServer, ConsumerServer
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer
from flashsale import events
from tests.support import asyncapi
from tests.support.api import reserve
from tests.support.engine import flashsalectl, manifest
from tests.support.eventually import until
from tests.support.ledgers import opened
from tests.support.manifests import flash_sale
from tests.support.paths import ROOT
from tests.support.recorded import in_ledger, read_all, received
from tests.support.redis_users import OPERATOR, of_api, url_of
from tests.support.servers import database

pytestmark = pytest.mark.slow

EXAMPLE = ROOT / "examples" / "order-service"
TOKEN = "order-" + "a" * 40
BUYERS = 60
STOCK = 50


class OrderService:
    """The example in a process of its own. Its decisions are in `output`."""

    def __init__(self, output: Path, addresses: Addresses, api: ApiServer) -> None:
        self._output = output
        self._command = [
            *(sys.executable, str(EXAMPLE / "order_service.py"), "--engine", addresses.engine),
            *("--kafka", addresses.kafka_bootstrap, "--orders", api.orders_url),
            *("--decline-rate", "0.4"),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {**os.environ, "FLASHSALE_ORDER_TOKENS": TOKEN, "NO_PROXY": "127.0.0.1"}
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(self._command, env=environment, stdout=output)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def decisions(self) -> list[dict[str, Any]]:
        """Return the complete lines."""
        lines = self._output.read_bytes().split(b"\n")[:-1]
        return [msgspec.json.decode(line) for line in lines]


@pytest.fixture(scope="module")
def addresses(
    redis_server: RedisServer, kafka_server: KafkaServer, postgres_server: PostgresServer
) -> Iterator[Addresses]:
    """An engine of its own, so that the example reads no messages of other tests."""
    name = f"shop-{uuid.uuid4().hex[:8]}"
    with database(postgres_server) as url:
        yield Addresses(url_of(redis_server, OPERATOR), kafka_server.bootstrap, url, name)


@pytest.fixture
def api(tmp_path: Path, addresses: Addresses) -> Iterator[ApiServer]:
    with ApiServer(tmp_path / "api", of_api(addresses), order_tokens=TOKEN) as server:
        yield server


@pytest.fixture
def consumer(tmp_path: Path, addresses: Addresses) -> Iterator[ConsumerServer]:
    with ConsumerServer(tmp_path / "consumer", addresses) as server:
        yield server


@pytest.fixture
def service(tmp_path: Path, addresses: Addresses, api: ApiServer) -> Iterator[OrderService]:
    service = OrderService(tmp_path / "decisions", addresses, api)
    service.start()
    yield service
    service.kill()


async def test_the_example_decides_on_every_hold_as_the_ledger_has_it(
    addresses: Addresses,
    api: ApiServer,
    consumer: ConsumerServer,
    service: OrderService,
    item: str,
) -> None:
    applied = await flashsalectl(
        addresses, "apply", "-f", "-", stdin=manifest(item, stock=STOCK, holdSeconds=600)
    )
    assert applied.returncode == 0, applied.stderr
    async with (
        httpx.AsyncClient(base_url=api.url, timeout=30) as buyers,
        opened(addresses.database_url) as ledger,
    ):
        statuses: Counter[int] = Counter()
        for number in range(BUYERS):
            if number == BUYERS // 3:
                service.kill()
                await asyncio.to_thread(service.start)
            if number == BUYERS // 2:
                consumer.kill()
                await asyncio.to_thread(consumer.start)
            statuses[(await reserve(buyers, item, f"user-{number}", 1)).status_code] += 1
        assert statuses[202] >= STOCK

        async def decided() -> bool:
            row = await ledger.sale(f"default/{item}")
            return row.accepted == statuses[202] and not row.held

        await until(decided)
        sale = f"default/{item}"
        found = await in_ledger(ledger.pool, sale)
        recorded = {each["reservationId"]: each for each in found.values()}

        def complete() -> bool:
            """Whether the last message of each reservation was decided on."""
            shipped = {each["reservationId"] for each in service.decisions()}
            last = [(e["reservationId"], e["state"]) for e in service.decisions()]
            return shipped == set(recorded) and all(
                (identity, each["state"]) in last for identity, each in recorded.items()
            )

        await until(complete, lambda: f"{service.decisions()}")
    decisions = defaultdict(set)
    for each in service.decisions():
        decisions[each["reservationId"]].add((each["state"], each["decision"]))
    for identity, each in recorded.items():
        order = f"order-{identity}"
        assert each["orderRef"] == order
        if each["state"] == "confirmed":
            assert decisions[identity] - {("held", "capture")} == {("confirmed", "ship")}
        else:
            assert each["state"] == "cancelled"
            assert decisions[identity] - {("held", "void")} == {("cancelled", "void")}
    assert {each["state"] for each in recorded.values()} == {"confirmed", "cancelled"}

    view = await received(addresses.kafka_bootstrap, addresses.engine)
    own = {key: each for key, each in view.reservations.items() if each["saleId"] == sale}
    assert own == {f"{sale}/{identity}": each for identity, each in recorded.items()}
    written = await read_all(addresses.kafka_bootstrap, events.topic(addresses.engine))
    assert len(written) >= 2 * statuses[202]
    for record in written:
        asyncapi.check("event", asyncapi.headers_of(record), msgspec.json.decode(record.value))


async def test_the_example_ships_an_order_of_a_later_sale_with_the_same_key(
    addresses: Addresses,
    api: ApiServer,
    consumer: ConsumerServer,  # noqa: ARG001 - it runs
    service: OrderService,
    item: str,
) -> None:
    """The reservation has the same id. The versions of the later sale begin at 1 again."""
    for sale_id in (f"default/{item}", f"default/{item}-2"):
        manifest = flash_sale(sale_id.partition("/")[2], item, stock=1)
        applied = await flashsalectl(addresses, "apply", "-f", "-", stdin=json.dumps(manifest))
        assert applied.returncode == 0, applied.stderr
        async with httpx.AsyncClient(base_url=api.url, timeout=30) as buyer:

            async def accepted() -> bool:
                return (await reserve(buyer, item, "ann", 1, "k" * 32)).status_code == 202

            await until(accepted)
        await until(partial(_shipped, service, sale_id), service.decisions)
        deleted = await flashsalectl(addresses, "delete", item)
        assert deleted.returncode == 0, deleted.stderr
    ids = {each["reservationId"] for each in service.decisions() if each["itemId"] == item}
    assert len(ids) == 1


def _shipped(service: OrderService, sale_id: str) -> bool:
    return any(
        (each["saleId"], each["decision"]) == (sale_id, "ship") for each in service.decisions()
    )
