"""Records of other producers in the topic of events."""

from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from dev.stack.servers import KafkaServer
from flashsale import events
from flashsale.errors import SettingsError
from flashsale.settings import KafkaSettings
from flashsale_consumer import dead_letters, offsets
from flashsale_consumer.dead_letters import DeadLetter, DeadLetters
from tests.support.consumer import BEYOND_POSTGRESQL, Log, accepted, held, running, until_recorded
from tests.support.eventually import until
from tests.support.ledgers import Ledger
from tests.support.producers import silence_first
from tests.support.recording import record


async def test_bad_records_between_events_become_dead_letters(
    ledger: Ledger, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    good = [accepted(number) for number in range(50)]
    valid = events.encode(accepted())
    bad: list[bytes | None] = [
        b"not JSON",
        b"[]",
        valid.replace(b'"quantity":1', b'"quantity":"1"'),
        valid.replace(b'"quantity":1', b'"quantity":-1'),
        valid.replace(b'"schema":1', b'"schema":2'),
        valid.replace(b'"default/phones"', b'"Phones"'),
        valid.replace(b'"user"', b'"us\\u0000er"'),
        valid.replace(b'"user"', b'"\xff\xfe"'),
        valid.replace(b'"user"', b'"' + b"u" * 900_000 + b'"'),
        b"[" * 100_000,
        b"",
        None,
        events.encode(accepted(accepted_at=BEYOND_POSTGRESQL)),
        events.encode(held(accepted_at=datetime(1969, 12, 31, tzinfo=UTC))),
        events.encode(held(expires_at=datetime.max.replace(tzinfo=UTC))),
        events.encode(accepted(user_id="refused-by-postgresql")),
    ]
    # The rules for events are stricter than the ledger's own, so give it another one.
    await ledger.pool.execute(
        "ALTER TABLE reservations ADD CHECK (user_id <> 'refused-by-postgresql')"
    )
    async with running(ledger.url, log) as worker:
        for number, value in enumerate(bad):
            await log.write(*good[3 * number : 3 * number + 3], value, partition=0)
        await log.write(*good[3 * len(bad) :], partition=0)
        await ledger.until_has(*good)
        letters = await log.dead_letters(len(bad))
        await until_recorded(len(good), worker)
        assert worker.events("dead_lettered") == len(bad)

    assert "refused-by-postgresql" not in caplog.text
    assert sorted(letter.value or b"" for letter in letters) == sorted(v or b"" for v in bad)
    assert all(letter.key is not None for letter in letters)
    offsets = {4 * number + 3 for number in range(len(bad))}
    for letter in letters:
        headers = dict(letter.headers)
        assert headers["schema"] == b"1"
        assert headers["reason"]
        assert b"refused-by-postgresql" not in headers["reason"]
        assert headers["original-topic"] == log.topic.encode()
        assert headers["original-partition"] == b"0"
        offsets.remove(int(headers["original-offset"]))
    assert len(await ledger.rows()) == len(good)


@pytest.mark.parametrize(
    "value",
    [None, b"", b"\xff\xfe", b"\0\n" + b"1" * 300_000],
    ids=["null", "empty", "not text", "long"],
)
async def test_any_header_of_another_producer_is_read(
    ledger: Ledger, log: Log, value: bytes | None
) -> None:
    foreign, good = [("traceparent", value), ("", value)], accepted()
    await log.write(b"bad", partition=0, headers=foreign)
    async with running(ledger.url, log) as worker:
        await until(lambda: worker.events("dead_lettered") == 1)
        await log.write(good, partition=0)
        await ledger.until_has(good)
        (letter,) = await log.dead_letters(1)
    assert list(letter.headers[:2]) == foreign


async def test_a_header_name_that_is_not_text_stops_no_partition(ledger: Ledger, log: Log) -> None:
    first, between, last, other = sold = [accepted(number) for number in range(4)]
    await log.write(first, partition=0)
    await log.write_undecodable(partition=0)
    await log.write(between, partition=0)
    await log.write_undecodable(partition=0)
    await log.write(last, partition=0)
    await log.write(other, partition=1)
    async with running(ledger.url, log) as worker:
        await ledger.until_has(*sold)
        letters = await log.dead_letters(6)
        assert (worker.events("recorded"), worker.events("dead_lettered")) == (4, 6)
        await until(lambda: worker.value("flashsale_consumer_announced_total") == 4)
    await ledger.pool.execute("UPDATE kafka_offsets SET announced_offset = 0")
    async with running(ledger.url, log) as worker:
        await until(lambda: worker.value("flashsale_consumer_announced_total") == 4)
    await log.delete(log.topic)  # other clients cannot read it

    headers = [dict(letter.headers) for letter in letters]
    omitted = [each for each in headers if each.get("omitted") == b"cannot be decoded"]
    assert sorted(int(each["original-offset"]) for each in omitted) == [2, 3, 6, 7]
    assert all(b"not UTF-8" in each["reason"] for each in omitted)


async def test_the_end_of_another_producers_transaction_is_read(ledger: Ledger, log: Log) -> None:
    """A rebuild waits until the ledger has read the topic to its end."""
    sold = accepted()

    async def reached_ends() -> bool:
        stored = await offsets.read(ledger.pool, log.topic, range(12))
        ends = (await log.ends()).items()
        return all(stored[number] == (end, end) for number, end in ends)

    async with running(ledger.url, log) as worker:
        await until(lambda: worker.partitions() == 12)
        await log.write_in_transaction(events.encode(sold), partition=0)
        await ledger.until_has(sold)
        await until(reached_ends, "the ledger has read all")
        await until(lambda: worker.total("flashsale_consumer_lag") == 0)
    await ledger.pool.execute("UPDATE kafka_offsets SET announced_offset = 0")
    async with running(ledger.url, log):
        await until(reached_ends, "all is announced again")


async def test_a_header_name_that_is_not_text_after_a_transaction_stops_no_partition(
    ledger: Ledger, log: Log
) -> None:
    await log.write_in_transaction(b"bad", partition=0)
    await log.write_undecodable(partition=0)
    sold = accepted()
    await log.write(sold, partition=0)
    async with running(ledger.url, log) as worker:
        await ledger.until_has(sold)
        assert worker.events("dead_lettered") == 4
    await log.delete(log.topic)  # other clients cannot read it


async def test_a_record_too_large_to_copy_does_not_stop_its_partition(
    ledger: Ledger, kafka_server: KafkaServer
) -> None:
    log = Log(kafka_server.bootstrap)
    await log.create(largest_dead_letter=1_000)
    good = accepted()
    await log.write(b"x" * 5_000, good, partition=0)
    async with running(ledger.url, log):
        await ledger.until_has(good)
        (letter,) = await log.dead_letters(1)
    headers = dict(letter.headers)
    assert (letter.value, headers["original-offset"]) == (b"", b"0")
    assert headers["omitted"] == b"too large to be copied"


async def test_a_producer_of_dead_letters_without_acknowledgements_is_replaced(
    ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiokafka sends to a broker that was killed again and again."""
    silence_first(monkeypatch, "send", log.dead_letter_topic)
    up = 'flashsale_consumer_server_up{server="dead_letters"}'
    good = accepted()
    async with running(ledger.url, log) as worker:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dead_letters, "PUBLISH_SECONDS", 1.0)
            await log.write(b"bad", good, partition=0)
            await until(lambda: worker.value(up) == 0)
        await ledger.until_has(good)
    (letter,) = await log.dead_letters(1)
    assert letter.value == b"bad"


async def test_a_certificate_that_is_wrong_after_its_renewal_only_delays_dead_letters(
    ledger: Ledger, log: Log
) -> None:
    """The connections of the others are open, so they go on."""

    def wrong(_: KafkaSettings) -> dict[str, object]:
        raise SettingsError("half a certificate")

    up = 'flashsale_consumer_server_up{server="dead_letters"}'
    good = accepted()
    async with running(ledger.url, log) as worker:
        await until(lambda: worker.partitions() == 12)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(KafkaSettings, "kafka_client", wrong)
            await log.write(b"bad", good, partition=0)
            await until(lambda: worker.value(up) == 0)
        await ledger.until_has(good)
        await until(lambda: worker.events("dead_lettered") == 1)


@pytest.mark.slow
async def test_the_offset_waits_until_dead_letters_are_written(
    ledger: Ledger, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    good = accepted()
    async with running(ledger.url, log) as worker:
        await until(lambda: worker.partitions() == 12)
        await log.delete(log.dead_letter_topic)
        await log.write(b"bad", good, partition=0)
        await until(lambda: f"waiting for {log.dead_letter_topic}" in caplog.text)
        assert await ledger.rows() == {}
        await log.create()
        await ledger.until_has(good)
        await until(lambda: worker.events("dead_lettered") >= 1)
        assert worker.events("dead_lettered") == 1
    (letter,) = await log.dead_letters(1)
    assert letter.value == b"bad"


async def test_no_row_is_locked_while_kafka_takes_undecodable_and_foreign_records(
    ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator and the consumers of other partitions need the rows of the sales."""
    published: list[int] = []
    publish = DeadLetters.publish

    async def look_and_publish(self: DeadLetters, letters: Sequence[DeadLetter]) -> None:
        if letters:
            await ledger.pool.execute("SELECT FROM sales FOR UPDATE NOWAIT")
            await ledger.pool.execute("SELECT FROM kafka_offsets FOR UPDATE NOWAIT")
            published.append(len(letters))
        await publish(self, letters)

    monkeypatch.setattr(DeadLetters, "publish", look_and_publish)
    good, foreign = accepted(), accepted(engine=str(uuid4()))
    await record(ledger, [accepted()])
    await log.write(good, b"bad", foreign, partition=0)
    async with running(ledger.url, log) as worker:
        await ledger.until_has(good)
        await until(lambda: worker.events("dead_lettered") == 2)
    assert sum(published) == 2
    assert {letter.value for letter in await log.dead_letters(2)} == {
        b"bad",
        events.encode(foreign),
    }


async def test_the_offset_moves_past_a_rejected_event_only_after_its_dead_letter(
    ledger: Ledger, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL rejects the event in the transaction that moves the offset."""
    stored: list[int] = []
    publish = DeadLetters.publish

    async def look_and_publish(self: DeadLetters, letters: Sequence[DeadLetter]) -> None:
        if letters:
            query = "SELECT next_offset FROM kafka_offsets WHERE partition = 0"
            stored.append(await ledger.pool.fetchval(query))
        await publish(self, letters)

    monkeypatch.setattr(DeadLetters, "publish", look_and_publish)
    await ledger.pool.execute("ALTER TABLE reservations ADD CHECK (user_id <> 'refused')")
    await log.write(accepted(user_id="refused"), partition=0)
    async with running(ledger.url, log) as worker:
        await until(lambda: worker.events("dead_lettered") == 1)
    assert stored == [0]
