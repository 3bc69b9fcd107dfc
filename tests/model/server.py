"""The Redis server in the model: its run and its clock, and how it loses data."""

from typing import Final

from tests.model.records import HELD, UNTRUSTED, Keys, SaleHash, Stamp
from tests.model.world import Unreachable, Violation, World

CLOCKS_APART: Final = 20.0
"""Difference between the clocks of two servers, in seconds."""
LOST_REPLIES: Final = 0.02
"""Share of the executed calls whose reply is lost."""


class Server:
    """The server's run, clock and data, and the fence that each script begins with."""

    def __init__(self, world: World, *, always: bool, outbox_limit: int = 1000) -> None:
        self.world = world
        self.always = always
        """Whether appendfsync is `always`. Otherwise a crash can lose the last second of writes."""
        self.outbox_limit = outbox_limit
        self.strict = False
        """Whether each write is followed by a comparison of all counts with the reservations."""
        self.up = True
        self.keys = Keys()
        self.run_id = world.new_id()
        self.replication_id = 0
        self.set_back = 0.0
        """How far the clock was set back since the start, in seconds."""
        self._copies: list[tuple[float, Keys]] = [(0.0, Keys())]

    @property
    def clock(self) -> float:
        """The server's clock in seconds. Each server's is set differently."""
        return self.world.now + (self.run_id % 3 - 1) * CLOCKS_APART - self.set_back

    @property
    def stamp(self) -> Stamp:
        """The server's run. A sale is trusted only if it was written under the same run."""
        by_replication = self.world.rules.fence_on_replication_id
        return (self.run_id, self.replication_id if by_replication else 0)

    def reached(self) -> None:
        """Raises `Unreachable` if a call cannot arrive. Nothing was executed."""
        if not self.up:
            raise Unreachable

    def replied(self, *, stamp: Stamp | None = None) -> None:
        """Raises `Unreachable` if the reply of an executed call is lost."""
        if not self.up or self.world.chance() < LOST_REPLIES:
            raise Unreachable
        if stamp is not None and stamp != self.stamp and self.world.chance() < 0.5:
            raise Unreachable

    def become(self, keys: Keys, *, restarted: bool = True, demoted: bool = True) -> None:
        """Takes an earlier state. The process restarts, was a replica meanwhile, or neither."""
        lost = self.keys.reservations.keys() - keys.reservations.keys()
        self.world.oracle.lost |= lost
        self.world.log("redis", "loses", *sorted(lost))
        self.keys = keys.copy()
        if restarted or demoted:
            self.replication_id = self.world.new_id()
        if restarted:
            self.run_id = self.world.new_id()
        self._copies.append((self.world.now, self.keys.copy()))

    def forget_replication(self) -> None:
        """Forgets the replication id, as a server without replicas does after some time."""
        self.replication_id = 0

    def copy_of(self, seconds: float) -> Keys:
        """Returns the state at a random moment of the last seconds."""
        since = self.world.now - seconds
        recent = [keys for at, keys in self._copies if at >= since]
        # The copy before them is the state at the beginning of that time.
        choice = self._copies[-len(recent) - 1 :] or self._copies
        return choice[int(self.world.chance() * len(choice))][1]

    def wrote(self) -> None:
        """Ends a script that wrote. Raises `Violation` if the sale is oversold."""
        sale = self.keys.sale
        if sale is not None and sale.accepted - sale.released > sale.allocated:
            raise Violation(f"Redis: buyers of {sale} have more units than are allocated")
        if (
            sale is not None
            and sale.state != "closed"  # closing does not change the allocation
            and sale.allocated > max(sale.stock, sale.accepted - sale.released)
        ):
            raise Violation(f"Redis: {sale} sells units above its stock")
        if self.strict and sale is not None and sale.stamp == self.stamp:
            self._compare(sale)
        self._copies.append((self.world.now, self.keys.copy()))

    def _compare(self, sale: SaleHash) -> None:
        """Raises `Violation` if a count of a trusted sale differs from its reservations."""
        every = self.keys.reservations.values()
        accepted = sum(event.quantity for event in every)
        final = sum(event.quantity for event in every if event.final)
        waiting = sum(event.quantity for event, _ in self.keys.outbox.values() if event.final)
        held = sum(event.quantity for event in every if event.state == HELD)
        if (sale.accepted, sale.released, sale.held) != (accepted, final - waiting, held):
            raise Violation(f"Redis: {sale}, but {accepted}, {final} - {waiting} and {held}")
        open_holds = {event.reservation_id for event in every if event.state == HELD}
        if open_holds != self.keys.holds.keys():
            raise Violation(f"Redis: {open_holds} are held, but {self.keys.holds} can expire")

    # sale.lua, which is part of every script.

    def fenced(self) -> bool:
        sale = self.keys.sale
        return self.world.rules.fence and sale is not None and sale.stamp != self.stamp

    def read_sale(self) -> SaleHash | None:
        """Returns the sale. If it was written under another run, the fence is latched."""
        sale, rules = self.keys.sale, self.world.rules
        if sale is not None and self.fenced() and rules.fence_latched and sale.stamp != UNTRUSTED:
            sale.stamp = UNTRUSTED
            self.wrote()
        return sale
