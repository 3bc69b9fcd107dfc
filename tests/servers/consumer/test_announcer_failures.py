"""The announcer while its topic, the ledger or the consumer fails. Needs PostgreSQL and Kafka."""

import asyncio
import gc
import itertools
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import NotEnoughReplicasError, TopicAuthorizationFailedError
from aiokafka.producer.message_accumulator import BatchBuilder

from flashsale import events
from flashsale.errors import SettingsError
from flashsale.events import Event
from flashsale.settings import KafkaSettings
from flashsale_consumer import announcer, topics, worker
from flashsale_consumer import offsets as stored_offsets
from flashsale_consumer.announcer import Announcer
from flashsale_consumer.offsets import Stored
from flashsale_consumer.partitions import Partitions
from flashsale_consumer.recorded import Message, Source
from tests.support.announced import offsets, until_announced, until_offsets
from tests.support.consumer import Log, accepted, changed, held, running
from tests.support.eventually import until
from tests.support.ledgers import Ledger
from tests.support.producers import silence_first
from tests.support.recorded import read_all, received
from tests.support.recording import rebuild, record
from tests.support.topics import administering, create_topic

KILLS = 200


@pytest.mark.slow
async def test_a_topic_that_refuses_messages_delays_only_the_announcements(
    ledger: Ledger, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    topic = events.recorded_topic(log.engine)
    await create_topic(log.bootstrap, topic, 12, {"max.message.bytes": "10"})
    sold = [accepted(number) for number in range(12_000)]
    async with running(ledger.url, log) as member:
        await log.write(*sold[:6_000])
        await ledger.until_has(*sold[:6_000])
        await until(lambda: f"waiting for {topic}" in caplog.text)
        await until(lambda: member.value("flashsale_consumer_unannounced_seconds") > 0)
        await log.write(*sold[6_000:])
        await ledger.until_has(*sold)
        await until(lambda: member.total("flashsale_consumer_unannounced_events") == 12_000)
        assert member.value('flashsale_consumer_server_up{server="recorded"}') == 0
        assert (await offsets(ledger))[1] == 0
        await configure(log, topic, {"max.message.bytes": "1000000"})
        await until_announced(ledger, log, len(sold))
        await until(lambda: member.total("flashsale_consumer_unannounced_events") == 0)
        await until(lambda: member.value("flashsale_consumer_unannounced_seconds") == 0)
        assert member.value('flashsale_consumer_server_up{server="recorded"}') == 1
    # A second failure is possible, while the batches are as small as for the former limit.
    assert caplog.text.count(f"waiting for {topic}") <= 2


@pytest.mark.parametrize(
    "error", [TopicAuthorizationFailedError(), SettingsError("half a certificate")]
)
async def test_a_topic_that_is_reached_again_is_up_although_nothing_is_owed(
    ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """An administrator creates it later, for example, or a renewed certificate is wrong."""
    create, refused = topics.create_recorded, True

    async def create_recorded(kafka: KafkaSettings, partitions: int) -> object:
        if refused:
            raise error
        return await create(kafka, partitions)

    monkeypatch.setattr(topics, "create_recorded", create_recorded)
    up = 'flashsale_consumer_server_up{server="recorded"}'
    async with running(ledger.url, log) as member:
        await until(lambda: member.value(up) == 0)
        refused = False
        await until(lambda: member.value(up) == 1)


async def test_a_topic_with_a_low_limit_gets_smaller_batches_until_it_is_raised(
    ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    topic = events.recorded_topic(log.engine)
    await create_topic(log.bootstrap, topic, 12, {"max.message.bytes": "4000"})
    send_batch = AIOKafkaProducer.send_batch
    sizes: list[int] = []

    async def measured(
        producer: AIOKafkaProducer, batch: BatchBuilder, topic: str, *, partition: int
    ) -> object:
        sizes.append(batch.size())
        return await send_batch(producer, batch, topic, partition=partition)

    monkeypatch.setattr(AIOKafkaProducer, "send_batch", measured)
    sold = [accepted(number) for number in range(1_800)]
    async with running(ledger.url, log):
        await log.write(*sold[:300])
        await until_announced(ledger, log, 300)
        await configure(log, topic, {"max.message.bytes": "1000000"})
        for count in range(600, len(sold) + 1, 300):
            sizes.clear()
            await log.write(*sold[count - 300 : count])
            await until_announced(ledger, log, count)
    assert max(sizes) > 4_000
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_a_producer_without_acknowledgements_is_replaced(
    ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiokafka sends to a broker that was killed again and again."""
    silence_first(monkeypatch, "send_batch", events.recorded_topic(log.engine))
    up = 'flashsale_consumer_server_up{server="recorded"}'
    async with running(ledger.url, log) as member:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(announcer, "PAGE_SECONDS", 1.0)
            await log.write(accepted())
            await until(lambda: member.value(up) == 0)
        await until_announced(ledger, log, 1)


@pytest.mark.parametrize("dated_by", ["LogAppendTime", "CreateTime"])
async def test_a_partition_that_is_away_brings_no_repeats_to_the_others(
    ledger: Ledger, log: Log, away: "Away", dated_by: str
) -> None:
    """For hours, they would fill the other partitions, for which Kafka deletes unread messages."""
    topic = events.recorded_topic(log.engine)
    await create_topic(log.bootstrap, topic, 12, {"message.timestamp.type": dated_by})
    sold = [accepted(number) for number in range(300)]
    async with running(ledger.url, log):
        await log.write(*sold)
        await until(lambda: away.refused > 1)
        away.partition = -1
        view = await until_announced(ledger, log, len(sold))
    assert set(view.ids.values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("partitions", [12, 6])
async def test_a_topic_that_is_recreated_while_a_partition_is_away_gets_all_messages(
    ledger: Ledger, log: Log, away: "Away", monkeypatch: pytest.MonkeyPatch, partitions: int
) -> None:
    """Another client recreates it, and soon it has more messages than the former one."""
    create, missing, waited = topics.create_recorded, False, 0

    async def create_recorded(kafka: KafkaSettings, partitions: int) -> object:
        nonlocal waited
        if missing:
            waited += 1
            raise TopicAuthorizationFailedError
        return await create(kafka, partitions)

    monkeypatch.setattr(topics, "create_recorded", create_recorded)
    topic = events.recorded_topic(log.engine)
    sold = [accepted(number) for number in range(300)]
    async with running(ledger.url, log):
        await log.write(*sold, partition=0)
        await until(lambda: away.refused > 1)
        missing = True
        await until(lambda: waited > 0)
        former = await read_all(log.bootstrap, topic)
        assert 0 < len(former) < len(sold)
        await log.delete(topic)
        await create_topic(log.bootstrap, topic, partitions)
        async with AIOKafkaProducer(bootstrap_servers=log.bootstrap) as producer:
            for number, _ in itertools.product(range(partitions), range(100)):
                key, value, headers = former[0].key, former[0].value, [*former[0].headers]
                await producer.send(topic, value, key, partition=number, headers=headers)
        away.partition = -1
        missing = False
        await until_announced(ledger, log, len(sold))


async def test_announcing_rebuilds_locks_the_sales_in_the_order_of_the_recorder(
    ledger: Ledger,
) -> None:
    """Otherwise both wait for each other, and PostgreSQL ends one of them."""
    names = ["default/z", "default/m", "default/a"]  # the order of the rows in the table
    for name in names:
        await record(ledger, [accepted(sale_id=name)])
    await rebuild(ledger, 2)
    source = Source(ledger.pool, str(UUID(int=0)))
    rebuilds = await source.rebuilds()

    async def waiting(count: int) -> bool:
        found: int = await ledger.pool.fetchval(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return found == count

    async with ledger.pool.acquire() as blocker:
        lock = blocker.transaction()
        await lock.start()
        await blocker.execute("SELECT FROM sales WHERE sale_id = 'default/m' FOR UPDATE")
        batch = [accepted(sale_id=name, revision=2) for name in names]
        recording = asyncio.create_task(record(ledger, batch))
        await until(lambda: waiting(1))
        announcing = asyncio.create_task(source.announced(rebuilds))
        await until(lambda: waiting(2))
        await lock.rollback()
    outcome, _ = await asyncio.gather(recording, announcing)
    assert outcome.recorded == len(names)
    assert await source.rebuilds() == []


async def test_an_announcer_whose_clock_is_wrong_says_so(
    ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a topic that dates messages by their producer's clock."""
    topic = events.recorded_topic(log.engine)
    await create_topic(log.bootstrap, topic, 12)
    ahead = SimpleNamespace(time=lambda: time.time() + 7200, monotonic=time.monotonic)
    monkeypatch.setattr(announcer, "time", ahead)
    async with running(ledger.url, log):
        await log.write(accepted())
        await until(lambda: "Kafka refuses the time of this machine's clock" in caplog.text)
        await configure(log, topic, {"message.timestamp.type": "LogAppendTime"})
        await until_announced(ledger, log, 1)


@pytest.mark.slow
async def test_a_missing_topic_is_created_again(ledger: Ledger, log: Log) -> None:
    first, second = accepted(), accepted(1)
    async with running(ledger.url, log):
        await log.write(first)
        await until_announced(ledger, log, 1)
        await log.delete(events.recorded_topic(log.engine))
        await log.write(second)
        await ledger.until_has(first, second)

        async def announced() -> bool:
            view = await received(log.bootstrap, log.engine)
            return f"{second.sale_id}/{second.reservation_id}" in view.reservations

        await until(announced, "the second reservation is announced")


@pytest.mark.slow
async def test_a_ledger_that_went_back_is_announced_again(ledger: Ledger, log: Log) -> None:
    first, second = ([accepted(number) for number in range(50)] for _ in range(2))
    async with running(ledger.url, log):
        await log.write(*first, partition=0)
        await until_announced(ledger, log, 50)
        await until_offsets(ledger, 50, 50)
        await log.write(*second, partition=0)
        await until_announced(ledger, log, 100)
        await until_offsets(ledger, 100, 100)
        async with ledger.pool.acquire() as connection, connection.transaction():
            # The commits of the second half are lost.
            await connection.execute(
                "DELETE FROM reservations WHERE reservation_id = ANY($1::uuid[])",
                [event.reservation_id for event in second],
            )
            await connection.execute("UPDATE sales SET accepted = 50")
            await connection.execute(
                "UPDATE kafka_offsets SET next_offset = 50, announced_offset = 40"
                " WHERE partition = 0"
            )
        await ledger.until_has(*first, *second)
        view = await until_announced(ledger, log, 100)
        await until_offsets(ledger, 100, 100)
    again = {each.reservation_id for each in (*first[40:], *second)}
    assert view.ids == {
        f"default/phones/{each.reservation_id}/1": 1 + (each.reservation_id in again)
        for each in (*first, *second)
    }


async def test_a_page_from_before_the_ledger_went_back_moves_no_offset_after_it(
    ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger can have recorded these events in another way since."""
    publish = Announcer._publish
    went_back = False

    async def publish_and_go_back(
        own: Announcer, producer: AIOKafkaProducer, messages: Sequence[Message]
    ) -> None:
        nonlocal went_back
        await publish(own, producer, messages)
        if messages and not went_back:
            went_back = True
            partitions = member.worker._partitions
            partitions._at({n: Stored(end, 0) for n, end in partitions.positions.items()})

    monkeypatch.setattr(Announcer, "_publish", publish_and_go_back)
    async with running(ledger.url, log) as member:
        await log.write(accepted(), partition=0)
        await until(lambda: member.value("flashsale_consumer_announced_total") == 2)


@pytest.mark.slow
async def test_the_receiver_misses_no_change_if_the_announcer_dies_at_any_step(
    ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 announcers die between a commit and its announcement, each a step later than the last.

    The next one knows nothing but the ledger's offsets. A round ends when an announcer survives,
    and the next round has other events.
    """
    started: asyncio.Future[tuple[Any, Partitions, str]] = asyncio.Future()

    async def handed_over(_: Announcer, *arguments: Any) -> None:  # noqa: ANN401
        started.set_result(arguments)
        await asyncio.Event().wait()

    monkeypatch.setattr(Announcer, "run", handed_over)
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.05)
    sold: list[Event] = []
    kills = 0
    async with running(ledger.url, log) as member:
        pool, partitions, engine_id = await started
        source = Source(pool, engine_id)
        await until(lambda: member.partitions() == 12)
        logs = {number: range(1_000_000) for number in range(12)}
        kafka = KafkaSettings(kafka_bootstrap=log.bootstrap, engine=log.engine)
        async with Announcer(kafka, member.metrics)._connected() as clients:
            while kills < KILLS:
                batch = [held(len(sold) + number) for number in range(3)]
                sold += batch
                await log.write(*batch, *(changed(event, "confirmed") for event in batch))
                await ledger.until_has(*batch)
                for step in itertools.count():
                    cut = Cut(step)
                    stored = await stored_offsets.read(pool, log.topic, logs)
                    partitions._at(await stored_offsets.place(pool, log.topic, logs, before=stored))
                    dying = Announcer(kafka, member.metrics)._announce(partitions, source, *clients)
                    task = asyncio.create_task(cut.run(dying))
                    await cut.reached(lambda: is_announced(ledger))
                    task.cancel()
                    await asyncio.wait([task])
                    if not cut.dead:
                        break
                    kills += 1
    view = await until_announced(ledger, log, len(sold))
    assert {each["state"] for each in view.reservations.values()} == {"confirmed"}


@pytest.fixture
def away(log: Log, monkeypatch: pytest.MonkeyPatch) -> "Away":
    away = Away(events.recorded_topic(log.engine))
    monkeypatch.setattr(AIOKafkaProducer, "send_batch", away.send_batch())
    return away


class Away:
    """A partition of a topic that refuses each batch at once."""

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self.partition = 5
        self.refused = 0

    def send_batch(self) -> Callable[..., Awaitable[object]]:
        original = AIOKafkaProducer.send_batch

        async def send_batch(
            producer: AIOKafkaProducer, batch: BatchBuilder, topic: str, *, partition: int
        ) -> object:
            if (topic, partition) != (self._topic, self.partition):
                return await original(producer, batch, topic, partition=partition)
            self.refused += 1
            refused: asyncio.Future[object] = asyncio.get_running_loop().create_future()
            refused.set_exception(NotEnoughReplicasError())
            return refused

        return send_batch


async def is_announced(ledger: Ledger) -> bool:
    recorded, announced = await offsets(ledger)
    return recorded == announced


class Cut:
    """Cancels a task at one of the points at which its coroutine waits."""

    def __init__(self, step: int) -> None:
        self._left = step
        self._cut = asyncio.Event()

    @property
    def dead(self) -> bool:
        return self._cut.is_set()

    async def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        await _Steps(coroutine, self._step)

    def _step(self) -> None:
        if self._left == 0:
            self._cut.set()
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        self._left -= 1

    async def reached(self, done: Callable[[], Awaitable[bool]]) -> None:
        """Wait for the cut, or until there is nothing to do."""

        async def look() -> bool:
            return self.dead or await done()

        await until(look, pause=0.01)


class _Steps:
    """A coroutine that calls a function each time it waits."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], step: Callable[[], None]) -> None:
        self._coroutine = coroutine
        self._step = step

    def __await__(self) -> Generator[Any, Any, None]:
        failure: BaseException | None = None
        while True:
            try:
                waits_for = (
                    self._coroutine.throw(failure) if failure else self._coroutine.send(None)
                )
            except StopIteration:
                return
            self._step()
            try:
                failure = None
                yield waits_for
            except BaseException as error:  # noqa: BLE001 - passed on to the coroutine
                failure = error


async def configure(log: Log, topic: str, configs: dict[str, str]) -> None:
    async with administering(log.bootstrap) as client:
        await client.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs)])
