"""A producer of which Kafka acknowledges nothing, as after a broker was killed."""

import asyncio
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer


def silence_first(monkeypatch: pytest.MonkeyPatch, method: str, topic: str) -> None:
    """Let the first producer that calls `method` for a topic wait for ever. aiokafka would, too."""
    original = getattr(AIOKafkaProducer, method)
    first: list[AIOKafkaProducer] = []

    async def send(producer: AIOKafkaProducer, *given: Any, **options: Any) -> object:  # noqa: ANN401
        if topic in given and producer in (first or [producer]):
            first[:] = [producer]
            return asyncio.get_running_loop().create_future()
        return await original(producer, *given, **options)

    monkeypatch.setattr(AIOKafkaProducer, method, send)
