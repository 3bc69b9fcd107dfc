"""Short schedules of calls, for parts of the protocol that random runs need too rarely.

Each schedule keeps its promises with the whole protocol, and raises `Violation` without its part.
The schedules of holds have a module of their own.
"""

from collections.abc import Callable
from typing import Final

from tests.model.hold_schedules import HOLD_SCHEDULES
from tests.model.operators import Operator
from tests.model.records import Heartbeat, Keys, Tables
from tests.model.rules import EXPIRY, SILENT, Rules
from tests.model.scene import LEASE, Scene
from tests.model.world import Violation

CLOCK_AHEAD, CLOCK_BEHIND = 2, 3
"""Run ids of servers whose clocks are ahead and behind. See `Redis.clock`."""


def the_server_forgets_its_failovers(rules: Rules) -> None:
    """Redis fails over and back, loses a unit, and is without replicas for an hour."""
    scene = Scene(rules, stock=1)
    before = scene.redis.keys.copy()
    first = scene.buy("first")
    scene.redis.become(before, restarted=False)
    scene.buy("meanwhile")
    scene.redis.forget_replication()
    second = scene.buy("second")
    scene.record(second)
    scene.record(first)
    scene.judge()


def redis_is_flushed_while_a_rebuild_waits(rules: Rules) -> None:
    """The second flush deletes the heartbeat of a pod that has an unacknowledged event."""
    scene = Scene(rules, stock=1)
    redis, world = scene.redis, scene.world
    first = scene.buy("first")
    redis.become(Keys(), restarted=False, demoted=False)
    fence = scene.fence()
    world.now += EXPIRY - 1
    redis.keys.heartbeats["api"] = Heartbeat(1, redis.clock, redis.stamp)
    world.now += 0.9
    redis.become(Keys(), restarted=False, demoted=False)
    world.now += 0.2
    goes_on = redis.mark_rebuild(fence.claim, fence.stamp, LEASE, again=True)
    if goes_on and not scene.operator.unpublished(fence.began, fence.sampled_from):
        scene.finish(fence)
    second = scene.buy("second")
    scene.record(second)
    scene.record(first)
    scene.judge()


def redis_fails_over_while_a_rebuild_waits(rules: Rules) -> None:
    """The replica has the mark. Its clock is ahead, so that all heartbeats look expired."""
    scene = Scene(rules, stock=1)
    redis, world = scene.redis, scene.world
    redis.run_id = CLOCK_BEHIND
    scene.declare(2)
    scene.finish(scene.fence())
    scene.record(scene.buy("before"))
    copy = redis.keys.copy()
    first = scene.buy("first")
    redis.become(copy, restarted=False)
    fence = scene.fence()
    world.now += EXPIRY + 1.0
    redis.keys.heartbeats["api"] = Heartbeat(1, redis.clock, redis.stamp)
    redis.become(redis.keys)
    redis.run_id = CLOCK_AHEAD
    goes_on = redis.mark_rebuild(fence.claim, fence.stamp, LEASE, again=True)
    if goes_on and not scene.operator.unpublished(fence.began, fence.sampled_from):
        scene.ledger.read_for_rebuild(fence.claim, scene.ledger.tables.offsets)
    scene.record(first)
    scene.judge()


def a_standby_lacks_a_restock(rules: Rules) -> None:
    """PostgreSQL fails over without a restock, whose revision a rebuild then takes again."""
    scene = Scene(rules, stock=1)
    scene.declare(2)
    cut_off = scene.buy("cut off", promised=False)
    scene.ledger.rewind(oldest=True)
    scene.redis.become(Keys())
    scene.finish(scene.fence())
    scene.declare(2)
    events = [scene.buy("first"), scene.buy("second")]
    scene.record(cut_off)
    scene.record(*events)
    scene.judge()


def an_older_copy_is_republished(rules: Rules) -> None:
    """Redis returns as an older copy. A person closes the sale and publishes its records again."""
    scene = Scene(rules, stock=1)
    scene.buy("cut off", promised=False)
    older = scene.redis.keys.copy()
    scene.redis.become(Keys())
    scene.finish(scene.fence())
    first = scene.buy("first")
    scene.redis.become(older)
    scene.declare(1, "closed")
    scene.record(*scene.redis.republish())
    scene.record(first)
    scene.judge()


def a_rebuild_and_a_pod_die_before_a_failover(rules: Rules) -> None:
    """The clock of the former server was ahead. Their marks seem to come from the future."""
    scene = Scene(rules, stock=1)
    redis, world = scene.redis, scene.world
    redis.run_id = CLOCK_AHEAD
    redis.keys.heartbeats["api"] = Heartbeat(1, redis.clock, redis.stamp)
    redis.mark_rebuild(scene.ledger.claim(1), redis.stamp, Operator.MARK_SECONDS)
    redis.become(redis.keys)
    redis.run_id = CLOCK_BEHIND
    scene.operator.begin()
    world.run(2 * EXPIRY + 5.0)
    if redis.fenced():
        raise Violation("the sale stays fenced")
    scene.record(scene.buy("first"))
    scene.judge()


def a_pod_dies_before_the_clock_is_set_back(rules: Rules) -> None:
    """Its last report has an event. It seems to come from the future."""
    scene = Scene(rules, stock=3)
    redis, world = scene.redis, scene.world
    scene.record(scene.buy("first"))
    former = redis.keys.copy()
    scene.record(scene.buy("second"))
    redis.keys = former
    redis.keys.heartbeats["api"] = Heartbeat(1, redis.clock, redis.stamp)
    redis.set_back = 100.0
    scene.operator.begin()
    world.run(2 * EXPIRY + 5.0)
    if redis.fenced():
        raise Violation("the sale stays fenced")
    scene.record(scene.buy("third"))
    scene.judge()


def the_clock_is_set_back_while_a_rebuild_waits(rules: Rules) -> None:
    """The report of a living pod, which has an event, seems to come from the future."""
    scene = Scene(rules, stock=1)
    redis, world = scene.redis, scene.world
    first = scene.buy("first")
    redis.become(Keys(), restarted=False, demoted=False)
    fence = scene.fence()
    world.now += EXPIRY + 1.0
    redis.keys.heartbeats["api"] = Heartbeat(1, redis.clock, redis.stamp)
    redis.set_back = 100.0
    waits = scene.operator.unpublished(fence.began, fence.sampled_from)
    if not waits and not scene.operator.clock_was_set(fence.began, fence.sampled_from):
        scene.finish(fence)
    second = scene.buy("second")
    scene.record(second)
    scene.record(first)
    scene.judge()


def a_frozen_primary_thaws_after_it_was_replaced(rules: Rules) -> None:
    """A pod that knows only the former primary calls it in the last moment of its freeze."""
    scene = Scene(rules, stock=1)
    redis, frozen_at = scene.redis, scene.world.now
    former = redis.keys.copy(), redis.run_id, redis.replication_id
    redis.become(redis.keys)
    scene.rebuild()
    linked = not rules.silent_links_closed or scene.world.now - frozen_at < SILENT
    first = None
    if linked:
        present = redis.keys, redis.run_id, redis.replication_id
        redis.keys, redis.run_id, redis.replication_id = former
        first = scene.buy("first")
        redis.keys, redis.run_id, redis.replication_id = present
    scene.record(scene.buy("second"))
    scene.record(first)
    scene.judge()


def redis_is_an_older_copy_in_the_same_run(rules: Rules) -> None:
    """The engine returns to a Redis that it has left, which still has its former run."""
    scene = Scene(rules, stock=2)
    scene.record(scene.buy("first"))
    former = scene.redis.keys.copy()
    scene.record(scene.buy("second"))
    scene.redis.keys = former
    scene.operator.begin()
    scene.world.run(30.0)
    scene.record(scene.buy("third"))
    scene.judge()


def a_sale_was_rebuilt_at_another_redis(rules: Rules) -> None:
    """The engine returns to a Redis that it has left. A unit was given back at the other one."""
    scene = Scene(rules, stock=2)
    redis = scene.redis
    scene.record(scene.buy("first"))
    former = redis.keys.copy(), redis.run_id, redis.replication_id
    redis.become(Keys())
    scene.rebuild()
    scene.record(scene.cancel("first")[1])
    redis.keys, redis.run_id, redis.replication_id = former
    scene.operator.begin()
    scene.wait(30.0)
    if redis.confirm("first", "order").event is not None:
        raise Violation("a reservation that was cancelled is confirmed")
    scene.record(scene.buy("second"))
    scene.judge()


def a_sale_was_rebuilt_and_closed_at_another_redis(rules: Rules) -> None:
    """The engine returns to a Redis that it has left. The sale is over, and has an order since."""
    scene = Scene(rules, stock=1)
    redis = scene.redis
    scene.record(scene.buy("first"))
    former = redis.keys.copy(), redis.run_id, redis.replication_id
    redis.become(Keys())
    scene.rebuild()
    scene.record(scene.confirm("first")[1])
    scene.declare(1, "closed")
    redis.keys, redis.run_id, redis.replication_id = former
    scene.operator.frees = False
    scene.operator.begin()
    scene.wait(30.0)
    if redis.cancel("first", None).event is not None:
        raise Violation("a reservation is cancelled without naming its order")
    scene.judge()


def a_backup_is_older_than_the_sale(rules: Rules) -> None:
    """Redis and the ledger lose the sale. Kafka has its event, which no consumer has read again."""
    scene = Scene(rules, stock=1)
    scene.operator.begin()
    scene.wait(5.0)
    first = scene.buy("first")
    if first is None:
        raise Violation("the first unit is not sold")
    scene.kafka.append([first])
    scene.read_kafka()
    scene.redis.become(Keys())
    scene.ledger.tables = Tables()
    scene.wait(EXPIRY + 10.0)
    second = scene.buy("second")
    scene.read_kafka()
    scene.record(second)
    scene.wait(EXPIRY + 10.0)
    scene.judge()


def a_late_settlement_meets_another_reservation(rules: Rules) -> None:
    """Redis loses an acknowledged entry, and gives its id to another reservation's entry."""
    scene = Scene(rules, stock=2)
    before = scene.redis.keys.copy()
    first = scene.buy("first")
    entry = scene.redis.keys.last_entry
    if first is None:
        raise Violation("the first unit is not sold")
    scene.ledger.record({}, {}, [first])
    scene.redis.become(before)
    scene.finish(scene.fence())
    scene.buy("second")  # its pod dies
    scene.redis.settle([(entry, first)])
    scene.sweep()
    scene.judge()


SCHEDULES: Final[tuple[tuple[str, Callable[[Rules], None]], ...]] = (
    ("fence_latched", the_server_forgets_its_failovers),
    ("lost_mark_ends_rebuild", redis_is_flushed_while_a_rebuild_waits),
    ("other_run_ends_rebuild", redis_fails_over_while_a_rebuild_waits),
    ("operator_commits_kept", a_standby_lacks_a_restock),
    ("fenced_not_republished", an_older_copy_is_republished),
    ("times_ahead_ignored", a_rebuild_and_a_pod_die_before_a_failover),
    ("times_ahead_ignored", a_pod_dies_before_the_clock_is_set_back),
    ("set_clock_ends_rebuild", the_clock_is_set_back_while_a_rebuild_waits),
    ("silent_links_closed", a_frozen_primary_thaws_after_it_was_replaced),
    ("ledger_knows_more", redis_is_an_older_copy_in_the_same_run),
    ("rebuilds_compared", a_sale_was_rebuilt_at_another_redis),
    ("closed_rebuilds_compared", a_sale_was_rebuilt_and_closed_at_another_redis),
    ("served_not_seeded", a_backup_is_older_than_the_sale),
    ("settle_matches", a_late_settlement_meets_another_reservation),
    *HOLD_SCHEDULES,
)
"""Parts of the protocol, each with a schedule that needs it."""
