"""Rebuilding a fenced sale in Redis: the scripts `fence`, `restore` and `trust` as typed calls.

The keys belong to one rebuild at a time, named by the revision that the ledger gave it; nothing of
them is believed before `trust`.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final

from redis.asyncio import Redis

from flashsale.keys import ITEMS, ItemKeys
from flashsale.reservations import Record
from flashsale.sale import Predecessor, SaleSpec
from flashsale.scripts import Script, Scripts, translated

PAGE: Final = 1_000
"""Reservations, or buyers, in one `restore` call: it holds Redis for about a millisecond."""
LEASE_MS: Final = 5_000
"""How long others leave a sale to a rebuild that does not say that it goes on."""


class Fenced(StrEnum):
    """What `fence.lua` answers; the words are the script's own."""

    FENCED = "fenced"
    BEGUN = "begun"
    TRUSTED = "trusted"
    REBUILDING = "rebuilding"
    SUPERSEDED = "superseded"
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

    async def rebuilding(self, item_id: str) -> bool:
        """Whether a rebuild has the item's sale, and said so less than its lease ago."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.time()
        pipeline.hmget(ItemKeys.of(item_id).sale, "run_id", "rebuild_until_ms")
        (seconds, microseconds), (run_id, until_ms) = await translated(pipeline.execute())
        return (
            str(run_id).startswith("rebuild:")
            and int(until_ms or 0) > seconds * 1000 + microseconds // 1000
        )

    async def fence(  # noqa: PLR0913 - what the row says, and what the rebuild does now
        self,
        spec: SaleSpec,
        claim: int,
        *,
        closed: bool = False,
        replaces: Predecessor | None = None,
        begin: bool = False,
        lease_ms: int = LEASE_MS,
    ) -> Fenced:
        """Has the sale wait for the rebuild `claim` for `lease_ms`, or begins to write it.

        `spec` is the ledger's row, `closed` if it says so, and `claim` the row's revision.
        `replaces` is as for `Inventory.apply`.
        """
        await translated(self._redis.sadd(ITEMS, spec.item_id))
        other_id, other_accepted = replaces or ("", 0)
        arguments = (
            *spec.arguments(claim, closed=closed),
            lease_ms,
            other_id,
            other_accepted,
            "1" if begin else "",
        )
        return Fenced(
            await self._scripts.call(self._fence, ItemKeys.of(spec.item_id).four, arguments)
        )

    async def restore(
        self,
        item_id: str,
        claim: int,
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
        arguments = (claim, LEASE_MS, len(buyers or ()), *pairs)
        return Trusted(
            await self._scripts.call(self._restore, ItemKeys.of(item_id).four, arguments)
        )

    async def trust(  # noqa: PLR0913 - each is a number to agree on
        self,
        item_id: str,
        claim: int,
        run_id: str,
        *,
        accepted: int,
        released: int,
        reservations: int,
        buyers: int,
    ) -> Trusted:
        """Ends the rebuild; `run_id` is the server's when it began."""
        arguments = (claim, run_id, accepted, released, reservations, buyers)
        return Trusted(await self._scripts.call(self._trust, ItemKeys.of(item_id).four, arguments))
