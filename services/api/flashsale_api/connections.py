"""Connections to Kafka that may have just closed when a request is sent.

uvloop raises a `RuntimeError` for such a write, and aiokafka expects only an `OSError`
(https://github.com/aio-libs/aiokafka/issues/1038). The error would end the API's process, or
aiokafka's task that reads metadata, which nothing starts again.
"""

from typing import Any

from aiokafka import conn
from aiokafka.errors import KafkaConnectionError


class _Connection(conn.AIOKafkaConnection):  # type: ignore[misc] # aiokafka has no types
    def send(self, request: Any, expect_response: bool = True) -> Any:  # noqa: ANN401 - aiokafka's
        try:
            return super().send(request, expect_response)
        except RuntimeError as error:
            if "the handler is closed" not in str(error):
                raise
            self.close(reason=conn.CloseReason.CONNECTION_BROKEN, exc=error)
            raise KafkaConnectionError(f"{self!r} has just closed") from error


def survive_closed_connections() -> None:
    """Lets all later connections of this process report that they have just closed."""
    conn.AIOKafkaConnection = _Connection
