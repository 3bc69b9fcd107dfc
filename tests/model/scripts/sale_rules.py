"""Calls that change a whole sale, for both the server and the model."""

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from flashsale.errors import ContractViolation
from flashsale.reservations import Outcome
from flashsale.sale import Predecessor
from tests.model.scripts import sale_model
from tests.model.scripts.item import Manifest
from tests.model.scripts.machine import (
    OWN_ENGINE,
    SALES,
    callers,
    chances,
    engines,
    expired_holds,
    holds,
    limits,
    pauses,
    revisions,
    stocks,
)
from tests.model.scripts.reservation_rules import ReservationRules

differences = st.tuples(st.sampled_from([0, 0, 0, 1]), st.sampled_from([0, 0, 0, -1, 1]))
"""Differences between a caller's ledger and Redis, in accepted and in released units."""


class SaleRules(ReservationRules):
    """Applies, closes, replaces, frees and reads the sale."""

    @initialize(stock=stocks, limit=limits, paused=pauses, hold=holds, most=expired_holds,
                engine=st.sampled_from([OWN_ENGINE, OWN_ENGINE, OWN_ENGINE, ""]))  # fmt: skip
    def seed(self, stock: int, limit: int, paused: bool, hold: int, most: int, engine: str) -> None:
        self.apply_manifest(
            Manifest(
                SALES[0],
                1,
                stock,
                limit,
                paused=paused,
                hold_seconds=hold,
                max_expired_holds=most,
                may_seed=True,
                engine=engine,
            )
        )

    @rule(
        sale_id=st.sampled_from([*SALES[:1] * 4, SALES[1]]),
        above=revisions,
        stock=stocks,
        limit=limits,
        window=st.tuples(
            st.sampled_from([None] * 6 + [-1, 1]),
            st.sampled_from([None] * 10 + [-1, 2, 5]),
        ),
        paused=pauses,
        hold=holds,
        may_seed=st.booleans(),
        replaces=st.one_of(st.none(), differences, differences),
        engine=engines,
    )
    def apply(
        self,
        sale_id: str,
        above: int,
        stock: int,
        limit: int,
        window: tuple[int | None, int | None],
        paused: bool,
        hold: int,
        may_seed: bool,
        replaces: tuple[int, int] | None,
        engine: str,
    ) -> None:
        other = SALES[1 - SALES.index(sale_id)]
        self.apply_manifest(
            Manifest(
                sale_id,
                self.next_revision(above),
                stock,
                limit,
                *window,
                paused=paused,
                hold_seconds=hold,
                may_seed=may_seed,
                replaces=None if replaces is None else self.predecessor(other, *replaces),
                engine=engine,
            )
        )

    @rule(stock=stocks, limit=limits, paused=pauses, hold=holds, most=expired_holds,
          again=chances, engine=engines)  # fmt: skip
    @precondition(lambda self: self.model.sale is not None)
    def edit(
        self, stock: int, limit: int, paused: bool, hold: int, most: int, again: int, engine: str
    ) -> None:
        """Applies the same sale again, mostly with a new revision and other values."""
        manifest = replace(self.hash.manifest, may_seed=False, replaces=None, engine=engine)
        if again > 25:
            manifest = replace(
                manifest,
                revision=self.next_revision(1),
                stock=stock,
                max_per_user=limit,
                paused=paused,
                hold_seconds=hold,
                max_expired_holds=most,
            )
        self.apply_manifest(manifest)

    @rule(sale_id=st.sampled_from([SALES[0], *SALES]), above=revisions, chance=chances,
          engine=callers)  # fmt: skip
    def close(self, sale_id: str, above: int, chance: int, engine: str) -> None:
        if chance > 30 and above >= 0 and engine == OWN_ENGINE:
            return  # rare, because a closed sale accepts nothing more
        revision = self.next_revision(above)
        self.close_sale(sale_id, revision, engine)
        if chance % 2:
            self.close_sale(sale_id, revision, engine)

    @rule(sale_id=st.sampled_from([SALES[0], *SALES]), above=st.sampled_from([0, 0, 0, -1]),
          difference=differences, engine=callers)  # fmt: skip
    def free(self, sale_id: str, above: int, difference: tuple[int, int], engine: str) -> None:
        sale = self.model.sale
        revision = above + (sale.manifest.revision if sale else self.revision)
        _, accepted, released = self.predecessor(sale_id, *difference)
        expected = sale_model.free(self.model, sale_id, revision, accepted, released, engine)
        call = self.server.inventory.free(
            self.item, sale_id, revision, accepted=accepted, released=released, engine_id=engine
        )
        assert self.server.run(call) is expected
        self.seen(f"free: {expected}")

    @rule(count=st.sampled_from([1, 500]))
    def page(self, count: int) -> None:
        """Reads all reservations, as a republishing does."""
        expected = sale_model.page(self.model)
        try:
            found = self.server.run(self._pages(count))
        except ContractViolation:
            assert expected in {Outcome.UNKNOWN, Outcome.FENCED}
        else:
            assert found == expected

    async def _pages(self, count: int) -> set[str]:
        found = set()
        pages = self.server.inventory.reservation_pages(self.item, count)
        async for snapshot, page in pages:
            assert snapshot == self.snapshot()
            found |= {reservation_id for reservation_id, _ in page}
        return found

    def predecessor(self, sale_id: str, accepted: int, released: int) -> Predecessor:
        """Returns the row of a sale with differences between the ledger and Redis."""
        sale = self.model.sale
        if sale is not None:
            accepted, released = accepted + sale.accepted, released + sale.released
        return Predecessor(sale_id, accepted, released)
