"""The engine's errors. Errors of client libraries are translated once, at the call."""


class FlashsaleError(Exception):
    """Base of the engine's errors. The text is one line that a person can act on."""


class SettingsError(FlashsaleError):
    """An environment variable is missing or wrong. The text names the variable and the rule."""


class RedisUnavailable(FlashsaleError):
    """Redis did not reply, or refused the call (loading, read-only, out of memory).

    If `maybe_executed` is true, the call was sent and no reply came back, so the script may have
    run. Sending the same reservation ids again is safe.
    """

    def __init__(self, message: str, *, maybe_executed: bool = False) -> None:
        super().__init__(message)
        self.maybe_executed = maybe_executed


class LedgerUnavailable(FlashsaleError):
    """PostgreSQL is unavailable, read-only or not migrated. Nothing was written."""


class UnmetRequirement(FlashsaleError):
    """A server lacks a requirement of docs/install.md. The text names it and the remedy.

    Retries cannot help before a person has changed the server.
    """


class ContractViolation(FlashsaleError):
    """Stored data has a format that this version does not support."""


class OtherEngine(FlashsaleError):
    """A part (ledger, Redis, topic or FlashSale) belongs to another engine. The text names both."""


class RedisMoved(FlashsaleError):
    """The ledger's sales were seeded in the Redis at another address."""


def has_just_closed(error: object) -> bool:
    """Whether a write failed because the other side has just closed the connection.

    asyncio raises an `OSError` for it. uvloop raises a `RuntimeError`, which many libraries do not
    expect.
    """
    return isinstance(error, RuntimeError) and "the handler is closed" in str(error)
