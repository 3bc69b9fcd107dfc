"""Call the scripts that rebuild a fenced sale in Redis: `fence`, `restore` and `trust`.

The keys belong to one rebuild at a time. Its name is the revision that the ledger gave it. The
API trusts nothing in the keys before `trust` has succeeded.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final, Literal

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from flashsale import pipelines
from flashsale.keys import DEFAULT_ENGINE, ItemKeys
from flashsale.nodes import Nodes
from flashsale.reservations import Record
from flashsale.sale import Predecessor, SaleSpec
from flashsale.scripts import Script, Scripts

RESTORE_PAGE: Final = 1_000
"""Reservations or buyers per `restore` call, which takes Redis about a millisecond."""
LEASE_MS: Final = 5_000
"""How long other processes leave a sale to a rebuild that does not renew its lease.

A lease that ends later was taken under the clock of a former server, and is void.
"""


Step = Literal["fence", "wait", "begin"]


class Fenced(StrEnum):
    """The answers of `fence.lua`."""

    FENCED = "fenced"
    BEGUN = "begun"
    TRUSTED = "trusted"
    REBUILDING = "rebuilding"
    SUPERSEDED = "superseded"
    UNDRAINED = "undrained"
    CONFLICT = "conflict"
    UNSUPPORTED = "unsupported"
    OTHER_ENGINE = "other_engine"


class Trusted(StrEnum):
    """The answers of `restore.lua` and `trust.lua`."""

    RESTORED = "restored"
    TRUSTED = "trusted"
    SUPERSEDED = "superseded"
    RESTARTED = "restarted"
    INCOMPLETE = "incomplete"


class Recovery:
    """The scripts as typed calls. Each raises `RedisUnavailable` if Redis cannot serve it."""

    longest_lease_ms = LEASE_MS

    def __init__(self, redis: Redis, engine: str = DEFAULT_ENGINE) -> None:
        self._nodes = Nodes.of_client(redis)
        self._engine = engine
        self._scripts = Scripts(self._nodes)
        self._fence = Script("fence")
        self._restore = Script("restore")
        self._trust = Script("trust")

    async def rebuilding(self, item_id: str) -> bool:
        """Whether another rebuild has the item's sale, and its lease has not run out."""
        key = self._keys(item_id).sale

        def queue(pipeline: Pipeline, _: str) -> None:
            pipeline.time()
            pipeline.hmget(key, "run_id", "rebuild_until_ms")

        found = await pipelines.each(self._nodes, [key], str, queue)
        (seconds, microseconds), (run_id, until_ms) = found[key]
        left_ms = int(until_ms or 0) - (seconds * 1000 + microseconds // 1000)
        return str(run_id).startswith("rebuild:") and 0 < left_ms <= self.longest_lease_ms

    async def fence(  # noqa: PLR0913 - the row, and the step of the rebuild
        self,
        spec: SaleSpec,
        claim: int,
        *,
        step: Step = "fence",
        recorded: int = 0,
        held: int = 0,
        rebuilt: int = 0,
        engine_id: str = "",
        run_id: str = "",
        closed: bool = False,
        replaces: Predecessor | None = None,
        lease_ms: int = LEASE_MS,
    ) -> Fenced:
        """Fences the sale for the rebuild `claim` until its lease ends, or begins to write it.

        `step` is "fence" for the first call and "wait" for each repeat. "begin" empties the keys.
        `recorded` and `held` are the ledger's accepted and held units, and `rebuilt` is its last
        rebuild. A sale with fewer accepted units in Redis, or fewer that are no longer held, or
        from before that rebuild, is never trusted. `run_id` is the server's run when the rebuild
        began: the wait for heartbeats counts on one server only.

        `spec`, `closed` and `claim` come from the ledger's row. `claim` is its revision.
        `replaces` is the same as for `Inventory.apply`.
        """
        other_id, other_accepted, other_released = replaces or ("", 0, 0)
        arguments = (
            *spec.arguments(claim, closed=closed),
            lease_ms,
            other_id,
            other_accepted,
            other_released,
            step,
            recorded,
            held,
            engine_id,
            run_id,
            self.longest_lease_ms,
            rebuilt,
        )
        return Fenced(
            await self._scripts.call(self._fence, self._keys(spec.item_id).sold, arguments)
        )

    async def restore(
        self,
        item_id: str,
        claim: int,
        *,
        buyers: Mapping[str, tuple[int, int]] | None = None,
        records: Sequence[tuple[str, Record]] = (),
    ) -> Trusted:
        """Writes at most `RESTORE_PAGE` buyers and reservations.

        A buyer has units and expired holds, and stays without units. A reservation is (id, record).
        """
        pairs: list[str | int] = []
        for user_id, (units, expired) in (buyers or {}).items():
            pairs += (user_id, f"{units},{expired}" if expired else units)
        for reservation_id, record in records:
            pairs += (reservation_id, str(record))
        arguments = (claim, LEASE_MS, len(buyers or ()), *pairs)
        return Trusted(await self._scripts.call(self._restore, self._keys(item_id).sold, arguments))

    async def trust(  # noqa: PLR0913 - the counts that must agree
        self,
        item_id: str,
        claim: int,
        run_id: str,
        *,
        accepted: int,
        released: int,
        held: int,
        reservations: int,
        buyers: int,
        holds: int,
    ) -> Trusted:
        """Ends the rebuild. `run_id` is the run of the server when the rebuild began.

        The first three numbers are units, and the others are the reservations, buyers and held
        reservations that were written.
        """
        arguments = (claim, run_id, accepted, released, held, reservations, buyers, holds)
        return Trusted(await self._scripts.call(self._trust, self._keys(item_id).sold, arguments))

    def _keys(self, item_id: str) -> ItemKeys:
        return ItemKeys.of(item_id, self._engine)
