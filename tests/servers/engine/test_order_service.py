"""The example of an order service, on a whole engine. Its decisions must agree with the ledger."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import RecordsToDelete

from dev.services import Addresses, ApiServer, ConsumerServer
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer
from flashsale import events
from flashsale.requirements import PARTITIONS
from tests.support import asyncapi
from tests.support.api import reserve
from tests.support.engine import flashsalectl, manifest
from tests.support.eventually import until
from tests.support.ledgers import opened
from tests.support.manifests import flash_sale
from tests.support.orders import order_client
from tests.support.paths import ROOT
from tests.support.recorded import in_ledger, read_all, received
from tests.support.redis_users import OPERATOR, of_api, url_of
from tests.support.servers import database
from tests.support.topics import administering

pytestmark = pytest.mark.slow

EXAMPLE = ROOT / "examples" / "order-service"
TOKEN = "order-" + "a" * 40
BUYERS = 60
STOCK = 50


class OrderService:
    """The example in a process of its own. Its decisions are in `output`."""

    def __init__(
        self, output: Path, addresses: Addresses, orders_url: str, decline_rate: float
    ) -> None:
        self._output = output
        self._command = [
            *(sys.executable, str(EXAMPLE / "order_service.py"), "--engine", addresses.engine),
            *("--kafka", addresses.kafka_bootstrap, "--orders", orders_url),
            *("--decline-rate", f"{decline_rate}"),
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

    def pause(self, seconds: float) -> None:
        """Stop the process for a time, as a suspended machine does."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self._process.send_signal(signal.SIGCONT)

    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def decisions(self) -> list[dict[str, Any]]:
        """Return the complete lines."""
        lines = self._output.read_bytes().split(b"\n")[:-1]
        return [msgspec.json.decode(line) for line in lines]


def order_of(data: dict[str, Any]) -> str:
    """Return the example's order of a reservation."""
    return f"order-{uuid.uuid5(uuid.UUID(data['reservationId']), data['saleId'])}"


@contextmanager
def gateway(orders_url: str, faults: list[tuple[int, str]]) -> Iterator[str]:
    """A gateway in front of the order port. It answers the first calls itself, with faults."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if faults:
                status, content = faults.pop(0)
            else:
                headers = {name: self.headers[name] for name in ("Authorization", "Content-Type")}
                url = f"{orders_url}{self.path}"
                found = httpx.request(self.command, url, content=body, headers=headers)
                status, content = found.status_code, found.text
            self.send_response(status)
            self.send_header("Retry-After", "Sat, 28 Nov 2026 12:00:00 GMT")
            self.end_headers()
            self.wfile.write(content.encode())

        do_GET = do_POST = answer  # noqa: N815 - its parent's names

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its parent's name
            """Keep stderr free of access logs."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


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
    service = OrderService(tmp_path / "decisions", addresses, api.orders_url, 0.4)
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
        assert each["orderRef"] == order_of(each)
        if each["state"] == "confirmed":
            # The example captures again if its memory of the capture was lost.
            payments = decisions[identity] - {("confirmed", "ship")}
            assert payments
            assert payments <= {("held", "capture"), ("confirmed", "capture")}
            assert ("confirmed", "ship") in decisions[identity]
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
            await until(lambda: accepts(buyer, item))
        await until(partial(_shipped, service, sale_id), service.decisions)
        deleted = await flashsalectl(addresses, "delete", item)
        assert deleted.returncode == 0, deleted.stderr
    ids = {each["reservationId"] for each in service.decisions() if each["itemId"] == item}
    assert len(ids) == 1


def _shipped(service: OrderService, sale_id: str) -> bool:
    return any(
        (each["saleId"], each["decision"]) == (sale_id, "ship") for each in service.decisions()
    )


async def apply(addresses: Addresses, name: str, item: str, **spec: object) -> None:
    done = await flashsalectl(
        addresses,
        "apply",
        "-f",
        "-",
        stdin=json.dumps(flash_sale(name, item, namespace=None, **spec)),
    )
    assert done.returncode == 0, done.stderr


async def accepts(buyer: httpx.AsyncClient, item: str) -> bool:
    """Reserve a unit. Each call has the same key."""
    return (await reserve(buyer, item, "ann", 1, "k" * 32)).status_code == 202


async def sells(buyer: httpx.AsyncClient, item: str) -> bool:
    return bool((await buyer.get(f"/sales/{item}")).json().get("available"))


def decided(service: OrderService, name: str) -> list[tuple[str, str]]:
    """Return the decisions on a sale's reservations, as pairs of state and decision."""
    return [
        (each["state"], each["decision"])
        for each in service.decisions()
        if each["saleId"] == f"default/{name}"
    ]


async def test_no_answer_but_the_order_port_s_own_decides_on_a_payment(
    addresses: Addresses,
    api: ApiServer,
    consumer: ConsumerServer,  # noqa: ARG001 - it runs
    tmp_path: Path,
    item: str,
) -> None:
    """A token that is rotated too early and a failing gateway void no payment."""
    faults = [
        (401, '{"type":"urn:flashsale:problem:unauthorized"}'),
        (404, "<html>default backend</html>"),
        (404, '{"type":"urn:flashsale:problem:not-found"}'),
        (502, "<html>bad gateway</html>"),
        (200, "<html>please log in</html>"),
        (504, ""),
    ]
    await apply(addresses, item, item, stock=1, holdSeconds=600)
    with gateway(api.orders_url, faults) as url:
        service = OrderService(tmp_path / "decisions", addresses, url, 0)
        service.start()
        try:
            async with httpx.AsyncClient(base_url=api.url, timeout=30) as buyer:
                assert (await reserve(buyer, item, "ann", 1)).status_code == 202
            await until(lambda: ("confirmed", "ship") in decided(service, item), service.decisions)
        finally:
            service.kill()
    assert faults == []
    assert decided(service, item) == [("held", "capture"), ("confirmed", "ship")]


async def test_an_order_is_not_shipped_unpaid_if_the_example_dies_before_it_captures(
    addresses: Addresses,
    api: ApiServer,
    consumer: ConsumerServer,  # noqa: ARG001 - it runs
    tmp_path: Path,
    item: str,
) -> None:
    """The sale is deleted before the example is back, so the order port does not know the hold."""
    await apply(addresses, item, item, stock=1, holdSeconds=600)
    async with (
        httpx.AsyncClient(base_url=api.url, timeout=30) as buyer,
        order_client(api, TOKEN) as orders,
    ):
        held = await reserve(buyer, item, "ann", 1)
        body = {"orderRef": order_of(held.json()), "saleId": f"default/{item}"}

        async def confirmed() -> bool:
            path = f"{held.headers['location']}/confirm"
            return (await orders.post(path, json=body)).status_code == 200

        await until(confirmed)

    async def deleted() -> bool:
        return (await flashsalectl(addresses, "delete", item)).returncode == 0

    await until(deleted)  # once the ledger has the confirmation
    service = OrderService(tmp_path / "decisions", addresses, api.orders_url, 0)
    service.start()
    try:
        await until(lambda: ("confirmed", "ship") in decided(service, item), service.decisions)
    finally:
        service.kill()
    assert decided(service, item) == [("confirmed", "capture"), ("confirmed", "ship")]


async def test_an_order_of_a_former_sale_takes_no_unit_of_the_next_one(
    addresses: Addresses,
    api: ApiServer,
    consumer: ConsumerServer,  # noqa: ARG001 - it runs
    tmp_path: Path,
    item: str,
) -> None:
    """The order port is away for the whole hold. A buyer repeats the key in the next sale."""
    faults = [(503, "{}")] * 1_000
    async with httpx.AsyncClient(base_url=api.url, timeout=30) as buyer:
        await apply(addresses, f"{item}-1", item, stock=1, holdSeconds=8)
        with gateway(api.orders_url, faults) as url:
            service = OrderService(tmp_path / "decisions", addresses, url, 0)
            service.start()
            try:
                await until(lambda: accepts(buyer, item))
                await until(lambda: len(faults) < 1_000)
                await until(lambda: sells(buyer, item))  # the hold has expired
                done = await flashsalectl(addresses, "delete", item)
                assert done.returncode == 0, done.stderr
                await apply(addresses, f"{item}-2", item, stock=1, holdSeconds=600)
                await until(lambda: accepts(buyer, item))
                faults.clear()
                await until(
                    lambda: ("confirmed", "ship") in decided(service, f"{item}-2"),
                    service.decisions,
                )
            finally:
                service.kill()
    assert decided(service, f"{item}-1") == [("expired", "void")]
    held = [("held", "capture"), ("confirmed", "ship")]
    assert decided(service, f"{item}-2") == held


async def test_a_late_message_of_a_former_sale_confirms_nothing_of_the_present_one(
    addresses: Addresses,
    api: ApiServer,
    consumer: ConsumerServer,  # noqa: ARG001 - it runs
    tmp_path: Path,
    item: str,
) -> None:
    """The example was away while a sale ended. A buyer repeats the key in the next sale."""
    async with httpx.AsyncClient(base_url=api.url, timeout=30) as buyer:
        await apply(addresses, f"{item}-1", item, stock=1, holdSeconds=1)
        await until(lambda: accepts(buyer, item))
        await until(lambda: sells(buyer, item))  # the hold has expired
        deleted = await flashsalectl(addresses, "delete", item)
        assert deleted.returncode == 0, deleted.stderr
        await apply(addresses, f"{item}-2", item, stock=1, holdSeconds=600)
        await until(lambda: accepts(buyer, item))
    service = OrderService(tmp_path / "decisions", addresses, api.orders_url, 0)
    service.start()
    try:
        await until(
            lambda: ("confirmed", "ship") in decided(service, f"{item}-2"), service.decisions
        )
        await until(lambda: ("expired", "void") in decided(service, f"{item}-1"), service.decisions)
    finally:
        service.kill()
    assert ("held", "capture") not in decided(service, f"{item}-1")
    (sold,) = [
        each
        for each in service.decisions()
        if each["saleId"] == f"default/{item}-2" and each["decision"] == "ship"
    ]
    assert sold["orderRef"] == order_of(sold)


async def test_the_example_charges_without_a_hold_and_ships_once(
    addresses: Addresses,
    api: ApiServer,
    consumer: ConsumerServer,  # noqa: ARG001 - it runs
    service: OrderService,
    item: str,
) -> None:
    """The second message about the reservation has the order's id."""
    await apply(addresses, item, item, stock=1)
    async with httpx.AsyncClient(base_url=api.url, timeout=30) as buyer:
        location = (await reserve(buyer, item, "ann", 1)).headers["location"]
    await until(lambda: ("confirmed", "ship") in decided(service, item), service.decisions)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=api.orders_url, headers=headers, timeout=30) as orders:
        for verb in ("confirm", "cancel"):
            answer = await orders.post(f"{location}/{verb}", json={"orderRef": "order-1"})
            assert answer.status_code == 200, answer.text
            await asyncio.sleep(2 if verb == "confirm" else 0)  # until its message was received
    await until(lambda: ("cancelled", "void") in decided(service, item), service.decisions)
    assert decided(service, item) == [
        ("confirmed", "charge"),
        ("confirmed", "ship"),
        ("cancelled", "void"),
    ]


async def test_the_example_survives_other_messages_and_the_loss_of_its_partitions(
    addresses: Addresses,
    api: ApiServer,
    consumer: ConsumerServer,  # noqa: ARG001 - it runs
    service: OrderService,
    item: str,
) -> None:
    await apply(addresses, item, item, stock=10)
    async with httpx.AsyncClient(base_url=api.url, timeout=30) as buyer:
        assert (await reserve(buyer, item, "ann", 1)).status_code == 202
        await until(lambda: len(decided(service, item)) == 2, service.decisions)
        topic = events.recorded_topic(addresses.engine)
        later = [("ce_type", b"dev.flashsale.reservation.held.v2")]
        async with AIOKafkaProducer(bootstrap_servers=addresses.kafka_bootstrap) as producer:
            ends = {}
            for partition in range(PARTITIONS):
                await producer.send_and_wait(topic, b"{}", partition=partition)
                last = await producer.send_and_wait(
                    topic, b"{}", partition=partition, headers=later
                )
                ends[TopicPartition(topic, partition)] = RecordsToDelete(last.offset + 1)
        await asyncio.to_thread(service.pause, 15)  # its session ends after ten seconds
        await asyncio.sleep(2)
        assert (await reserve(buyer, item, "bob", 1)).status_code == 202
        await until(lambda: len(decided(service, item)) == 4, service.decisions)
    assert service.runs()
    async with administering(addresses.kafka_bootstrap) as admin:
        await admin.delete_records(
            ends
        )  # they are not in the contract, which is checked in the end
