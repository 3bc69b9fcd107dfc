"""Rebuilding a fenced sale in Redis: the scripts `fence`, `restore` and `trust` as typed calls.

The keys belong to one rebuild at a time, by its token; nothing of them is believed before `trust`.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final

from redis.asyncio import Redis

from flashsale.keys import ITEMS, ItemKeys
from flashsale.reservations import Record
from flashsale.sale import SaleSpec
from flashsale.scripts import Script, Scripts, translated

PAGE: Final = 1_000
"""Reservations, or buyers, in one `restore` call: it holds Redis for about a millisecond."""


class Fenced(StrEnum):
    """What `fence.lua` answers; the words are the script's own."""

    FENCED = "fenced"
    BEGUN = "begun"
    TRUSTED = "trusted"
    UNDRAINED = "undrained"
    CONFLICT = "conflict"
    UNSUPPORTED = "unsupported"


class Trusted(StrEnum):
    """What `restore.lua` and `trust.lua` answer; the words are the scripts' own."""

    RESTORED = "restored"
    TRUSTED = "trusted"
    SUPERSEDED = "superseded"
    RESTARTED = "restarted"
    INCOMPLETE = "incomplete"


class Recovery:
    """Every method raises `RedisUnavailable` when Redis cannot serve the call."""

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis
        self._scripts = Scripts(redis)
        self._fence = Script("fence")
        self._restore = Script("restore")
        self._trust = Script("trust")

    async def fence(
        self, spec: SaleSpec, revision: int, *, finished: str | None = None, token: str = ""
    ) -> Fenced:
        """Marks the sale as not to be trusted; with a token begins the rebuild of that token.

        `spec` and `revision` are the ledger's row; `finished` is "closed" or "ended" if it is.
        """
        await translated(self._redis.sadd(ITEMS, spec.item_id))
        arguments = (
            spec.sale_id,
            revision,
            spec.stock,
            spec.max_per_user,
            "" if spec.starts_ms is None else spec.starts_ms,
            "" if spec.ends_ms is None else spec.ends_ms,
            finished or ("paused" if spec.paused else "open"),
            spec.display_name or "",
            token,
        )
        return Fenced(
            await self._scripts.call(self._fence, ItemKeys.of(spec.item_id).four, arguments)
        )

    async def restore(
        self,
        item_id: str,
        token: str,
        *,
        buyers: Mapping[str, int] | None = None,
        records: Sequence[tuple[str, Record]] = (),
    ) -> Trusted:
        """Writes at most `PAGE` buyers (units held by user) and reservations (id and record)."""
        pairs: list[str | int] = []
        for user_id, units in (buyers or {}).items():
            pairs += (user_id, units)
        for reservation_id, record in records:
            pairs += (reservation_id, ",".join(map(str, record)))
        arguments = (token, len(buyers or ()), *pairs)
        return Trusted(
            await self._scripts.call(self._restore, ItemKeys.of(item_id).four, arguments)
        )

    async def trust(  # noqa: PLR0913 - each is a number to agree on
        self,
        item_id: str,
        token: str,
        run_id: str,
        *,
        accepted: int,
        released: int,
        reservations: int,
        buyers: int,
    ) -> Trusted:
        """Ends the rebuild; `run_id` is the server's when it began."""
        arguments = (token, run_id, accepted, released, reservations, buyers)
        return Trusted(await self._scripts.call(self._trust, ItemKeys.of(item_id).four, arguments))
