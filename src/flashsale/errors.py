"""Errors that the contract's clients raise, translated once, where the client is called."""


class FlashsaleError(Exception):
    """Base of the engine's errors; its text is one line that a person can act on."""


class SettingsError(FlashsaleError):
    """An environment variable is missing or wrong; the text names it and the rule."""


class RedisUnavailable(FlashsaleError):
    """Redis did not answer, or refused to work (loading, read-only, out of memory).

    `maybe_executed` says whether the script may have run all the same: the call was sent and no
    answer came back. Sending the same reservation ids again is then safe.
    """

    def __init__(self, message: str, *, maybe_executed: bool = False) -> None:
        super().__init__(message)
        self.maybe_executed = maybe_executed


class LedgerUnavailable(FlashsaleError):
    """PostgreSQL is away, read-only or not migrated; nothing was written."""


class ContractViolation(FlashsaleError):
    """Stored data is not of the format that this version speaks."""
