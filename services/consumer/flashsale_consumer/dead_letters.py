"""Publishes records that the ledger cannot take to a topic of their own, with the reason."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from aiokafka import AIOKafkaProducer, ConsumerRecord
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, RecordListTooLargeError

from flashsale import kafka_clients
from flashsale.errors import SettingsError
from flashsale.settings import KafkaSettings
from flashsale_consumer.topics import DEAD_LETTER_BYTES

REASON_CHARACTERS: Final = 1_000
PUBLISH_SECONDS: Final = 20.0
"""How long Kafka may take to acknowledge all letters of a batch. A transaction may take longer."""
_REQUEST_TIMEOUT_MS: Final = 10_000


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record and the reason why the ledger cannot take it."""

    record: ConsumerRecord
    reason: str

    def headers(self) -> list[tuple[str, bytes]]:
        """Returns the record's own headers, the reason, and the place in the original topic."""
        return [
            *self.record.headers,
            ("reason", self.reason[:REASON_CHARACTERS].encode(errors="replace")),
            ("original-topic", self.record.topic.encode()),
            ("original-partition", str(self.record.partition).encode()),
            ("original-offset", str(self.record.offset).encode()),
        ]


class DeadLettersUnavailable(Exception):
    """Kafka did not acknowledge a dead letter."""


class DeadLetters:
    """A publisher of dead letters. Its producer starts with the first one."""

    def __init__(self, kafka: KafkaSettings, topic: str) -> None:
        self._kafka = kafka
        self._topic = topic
        self._producer: AIOKafkaProducer | None = None

    async def publish(self, letters: Sequence[DeadLetter]) -> None:
        """Returns once all in-sync replicas have all letters.

        Raises `DeadLettersUnavailable` if they do not. Some letters may then be published already,
        and a repeated call publishes them again.
        """
        if not letters:
            return
        try:
            # aiokafka retries without a limit if a broker was killed.
            async with asyncio.timeout(PUBLISH_SECONDS):
                producer = await self._started()
                acknowledged = await asyncio.gather(
                    *(_publish(producer, self._topic, letter) for letter in letters),
                    return_exceptions=True,
                )
            for failure in acknowledged:
                if isinstance(failure, BaseException):
                    raise failure
        except (KafkaError, SettingsError, TimeoutError) as error:
            # A producer never gives up its pending records, so the next call starts another one.
            await self.close()
            raise DeadLettersUnavailable(f"{self._topic}: {error!r}") from error

    async def close(self) -> None:
        """Closes the producer, if there is one, within seconds."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await kafka_clients.close(
                "the producer of dead letters", kafka_clients.discard(producer)
            )

    async def _started(self) -> AIOKafkaProducer:
        if self._producer is None:
            self._producer = AIOKafkaProducer(
                **self._kafka.kafka_client(),
                acks="all",
                max_request_size=DEAD_LETTER_BYTES,
                request_timeout_ms=_REQUEST_TIMEOUT_MS,
            )
            await self._producer.start()
        return self._producer


async def _publish(producer: AIOKafkaProducer, topic: str, letter: DeadLetter) -> None:
    record, headers = letter.record, letter.headers()
    # aiokafka requires a key or a value.
    value = b"" if record.value is None and record.key is None else record.value
    try:
        await producer.send_and_wait(topic, value, record.key, headers=headers)
    except (MessageSizeTooLargeError, RecordListTooLargeError):
        # Publish only its place in the original topic. Otherwise the record would block its
        # partition forever.
        headers = [*headers[len(record.headers) :], ("omitted", b"too large to be copied")]
        await producer.send_and_wait(topic, b"", headers=headers)
