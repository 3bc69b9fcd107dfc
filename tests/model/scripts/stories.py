"""Rules that make several calls, because random ones seldom make these in this order."""

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from flashsale.reservations import OrderCall
from tests.model.scripts import reservation_model
from tests.model.scripts.item import THIS_RUN, Manifest
from tests.model.scripts.machine import (
    OWN_ENGINE,
    PARTS,
    SALES,
    TRACE,
    chances,
    holds,
    limits,
    stocks,
)
from tests.model.scripts.rebuild_rules import RebuildRules, interruptions, miscounts
from tests.model.scripts.sale_rules import SaleRules

VERBS: tuple[reservation_model.Verb, ...] = ("confirm", "cancel")


class Stories(SaleRules, RebuildRules):
    """All calls and faults, single and in stories."""

    @rule(stock=stocks, limit=limits, hold=holds)
    @precondition(lambda self: self.model.useless(OWN_ENGINE))
    def start_over(self, stock: int, limit: int, hold: int) -> None:
        """Deletes all keys and seeds a sale, so that the rest of the sequence does something."""
        manifest = Manifest(
            SALES[0],
            self.next_revision(1),
            stock,
            limit,
            hold_seconds=hold,
            may_seed=True,
            engine=OWN_ENGINE,
        )
        self.apply_manifest(manifest)  # must not repair a lost sale
        for part in PARTS:
            self.lose_part(part)
        self.apply_manifest(manifest)

    def open(self, units: int) -> None:
        """Makes the item sell at least these units."""
        if self.model.useless(OWN_ENGINE):
            self.start_over(20, 3, 290)
        if self.model.fenced:
            self.rebuild("", early="")
        if self.hash.state != "open" or self.hash.available < units:
            self.edit_sale(stock=self.hash.allocated + 12, paused=False)

    @rule(
        first=st.integers(0, 5),
        quantities=st.lists(st.sampled_from([1, 1, 2]), min_size=6, max_size=6),
        fates=st.lists(
            st.sampled_from(["confirm", "cancel", "expire", "expire"]), min_size=2, max_size=6
        ),
        hours=st.sampled_from([1, 3]),
        lowered=st.sampled_from(["", "", "", "", "stock", "stock and closed"]),
        drained=st.booleans(),
        holding=st.sampled_from([True, True, True, False]),
    )
    def shop(
        self,
        first: int,
        quantities: list[int],
        fates: list[str],
        hours: int,
        lowered: str,
        drained: bool,
        holding: bool,
    ) -> None:
        """Reserves, ends each hold in its way, and offers the units to other users.

        In the end, the first users repeat their requests. Without `holding`, the sale then has no
        more holds, and they want other units. If it is `lowered`, the units come back to a sale
        with a stock of 1.
        """
        self.open(len(fates))
        if drained:
            self.drain_outbox()
        users = [(first + n) % 6 for n in range(len(fates))]
        wanted = zip(users, quantities[: len(fates)], strict=True)
        self.reserve([(user, quantity, 99) for user, quantity in wanted])
        requests = self.used[-len(fates) :]
        for verb in VERBS:
            ended = [
                OrderCall(request.reservation_id, "a", TRACE)
                for request, fate in zip(requests, fates, strict=True)
                if fate == verb
            ]
            if ended:
                self.change_records(verb, ended, OWN_ENGINE)
        self.pass_hours(hours)
        for limit in (1, 128):
            self.expire(limit, OWN_ENGINE)
        if lowered:
            self.edit_sale(stock=1)
        if lowered == "stock and closed":
            self.close_sale(self.hash.manifest.sale_id, self.next_revision(1), OWN_ENGINE)
        if drained:
            self.drain_outbox()
        self.crowd(first + 2, len(fates))
        self.send(requests)
        if not holding:
            self.edit_sale(hold_seconds=0)
            self.crowd(first, len(fates))

    @rule(stock=stocks, limit=limits, hold=holds, freed=st.booleans(), chance=chances,
          obstacle=st.sampled_from(["", "hold", "entry", "accepted", "released"]))  # fmt: skip
    @precondition(lambda self: self.model.sale is not None)
    def succeed(
        self, stock: int, limit: int, hold: int, freed: bool, chance: int, obstacle: str
    ) -> None:
        """Closes the sale, and frees its keys or applies another sale in its place.

        At most one thing stands against both: holds, entries in the outbox, or a ledger that has
        another count of accepted or of released units.
        """
        if chance > 20:
            return
        if obstacle in {"hold", "entry"}:
            self.reserve([(chance % 6, 1, 99)])
        if obstacle != "hold":
            self.confirm_holds()
        former, revision = self.hash.manifest.sale_id, self.next_revision(1)
        self.close_sale(former, revision, OWN_ENGINE)
        if obstacle != "entry":
            self.drain_outbox()
        difference = (int(obstacle == "accepted"), (obstacle == "released") * (1 - chance % 2 * 2))
        if freed or obstacle:
            self.free(former, 0, difference, OWN_ENGINE)
        self.apply_manifest(
            Manifest(
                SALES[1 - SALES.index(former)],
                self.next_revision(1),
                stock,
                limit,
                hold_seconds=hold,
                may_seed=True,
                replaces=self.predecessor(former, *difference),
                engine=OWN_ENGINE,
            )
        )

    @rule(chance=chances, closed=st.booleans(), lost=st.booleans())
    @precondition(lambda self: self.model.sale is not None)
    def end(self, chance: int, closed: bool, lost: bool) -> None:
        """Moves the end of the sale to the present, and closes it, or another buyer comes."""
        if chance > 20:
            return  # rare, because an ended sale accepts nothing more
        self.edit_sale(ends_hour=self.hash.last_hour)
        if closed:
            self.close_sale(self.hash.manifest.sale_id, self.next_revision(0), OWN_ENGINE)
        else:
            self.crowd(chance % 6, 1)
        if lost and self.hash.run == THIS_RUN:
            self.change_run()
            self.rebuild("", early="")

    @rule(first=st.integers(0, 5), size=st.integers(2, 6), wrong=miscounts,
          early=interruptions)  # fmt: skip
    def recover(self, first: int, size: int, wrong: str, early: str) -> None:
        """Rebuilds a sale with holds after the server has lost its run."""
        self.open(size)
        self.crowd(first, size)
        self.change_run()
        self.rebuild(wrong, early)
