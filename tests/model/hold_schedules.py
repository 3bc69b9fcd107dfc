"""Short schedules of calls, for the parts of the holds that random runs need too rarely.

Unless a schedule starts a pod, each call is made by a pod that dies before Kafka has its event.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from tests.model.pods import Pod
from tests.model.records import HELD, MAX_EXPIRED_HOLDS, Event, Keys
from tests.model.rules import EXPIRY, Rules
from tests.model.scene import Scene, ask_again, order
from tests.model.world import Violation

HOLD: Final = 10.0


def a_buyer_pays_in_the_last_second(rules: Rules) -> None:
    """The confirmation is sent before the hold's end. A sweep comes first."""
    scene = Scene(rules, stock=1, hold=HOLD)
    scene.buy("first")
    scene.world.now += HOLD + 0.02
    scene.redis.expire(3)
    scene.confirm("first")


def a_shop_refunds_an_order_without_a_hold(rules: Rules) -> None:
    """The reservation was confirmed at once, before it had an order."""
    scene = Scene(rules, stock=1)
    scene.record(scene.buy("first"))
    scene.record(scene.confirm("first")[1])
    if scene.redis.cancel("first", "another order").outcome != "other_order":
        raise Violation("another order cancels the reservation")
    scene.record(scene.cancel("first", "order")[1])
    scene.judge()


def the_outbox_is_full_when_a_buyer_pays(rules: Rules) -> None:
    """Kafka is down, and the outbox has reached its limit."""
    scene = Scene(rules, stock=2, hold=HOLD, outbox_limit=1)
    scene.buy("first")
    if scene.buy("second") is not None:
        raise Violation("a full outbox takes another reservation")
    scene.confirm("first")


# Redis has sold a unit twice, and the ledger refused the second sale.


def a_refused_hold_ends(rules: Rules) -> None:
    """Redis sells its unit again. The ledger has no room for that sale either."""
    scene = Scene(rules, stock=1, hold=HOLD)
    sell_twice(scene)
    scene.record(scene.cancel("second")[1])
    scene.record(scene.buy("third", promised=False))
    scene.judge()


def a_refused_reservation_is_confirmed(rules: Rules) -> None:
    """Its first event is published again after a restock, and the second one is not."""
    scene = Scene(rules, stock=1, hold=HOLD)
    held = sell_twice(scene)
    scene.record(scene.confirm("second")[1])
    scene.declare(2)
    scene.record(held)
    found = scene.ledger.tables.reservations.get("second")
    if found is not None and found.state == HELD:
        raise Violation("the ledger has the confirmed reservation as a hold")


def sell_twice(scene: Scene) -> Event | None:
    """Sells the only unit to a second buyer, from an older copy of Redis in the same run."""
    before = scene.redis.keys.copy()
    scene.record(scene.buy("first"))
    scene.redis.keys = before
    held = scene.buy("second", promised=False)
    scene.record(held)
    return held


# Durable before 200.


def kafka_acknowledges_after_a_rebuild(rules: Rules) -> None:
    """A follower lags. Meanwhile Redis fails over, and a suspended pod is given up."""
    scene = Scene(rules, stock=1, hold=HOLD)
    scene.record(scene.buy("first"))
    before, pod = scene.redis.keys.copy(), scene.pod()
    scene.kafka.delay = 14.0  # half of it passes
    order(pod, "confirm", "first")
    scene.wait(0.5)
    pod.suspend(8.0)
    scene.redis.become(before, restarted=False)
    scene.rebuild()
    scene.wait(3.0)
    scene.expire(HOLD)


def a_confirmation_is_answered_before_kafka_has_it(rules: Rules) -> None:
    """The pod dies right after its answer, and Redis loses the confirmation."""
    scene = Scene(rules, stock=1, hold=HOLD)
    scene.record(scene.buy("first"))
    before, pod = scene.redis.keys.copy(), scene.pod()
    lose_a_call(scene, pod, "confirm", before)
    scene.expire(HOLD)


def a_refund_is_answered_before_kafka_has_it(rules: Rules) -> None:
    """The pod dies right after its answer, and Redis loses the cancellation."""
    scene = Scene(rules, stock=1, hold=HOLD)
    scene.record(scene.buy("first"))
    scene.record(scene.confirm("first")[1])
    before, pod = scene.redis.keys.copy(), scene.pod()
    lose_a_call(scene, pod, "cancel", before)
    scene.judge()


def a_repeated_confirmation_is_only_in_redis(rules: Rules) -> None:
    """The first call's pod is dead. The second pod answers, and dies before Kafka has the event."""
    scene = Scene(rules, stock=1, hold=HOLD)
    scene.record(scene.buy("first"))
    before = scene.redis.keys.copy()
    scene.confirm("first")
    lose_a_call(scene, scene.pod(), "confirm", before)
    scene.expire(HOLD)


def a_replaced_primary_is_asked_about_an_order(rules: Rules) -> None:
    """It was cut off. A pod that reaches only this server asks about a paid reservation."""
    scene = Scene(rules, stock=1, hold=HOLD)
    redis, cut_off_at = scene.redis, scene.world.now
    former = redis.keys.copy(), redis.run_id, redis.replication_id
    redis.become(redis.keys)
    scene.rebuild()
    scene.record(scene.buy("first"))
    scene.record(scene.confirm("first")[1])
    heard = scene.world.now - cut_off_at < EXPIRY
    if heard or not rules.orders_need_a_heartbeat:
        redis.keys, redis.run_id, redis.replication_id = former
        if redis.confirm("first", "order").outcome == "not_found":
            raise Violation("the order service voids the payment of a recorded reservation")


def an_acknowledgement_of_another_event(rules: Rules) -> None:
    """The pod publishes a repeated reservation, and then the confirmation of the same one."""
    scene = Scene(rules, stock=1, hold=HOLD)
    scene.record(scene.buy("first"))
    before, pod = scene.redis.keys.copy(), scene.pod()
    scene.kafka.delay = 1.2
    ask_again(pod, "first")
    scene.wait(0.3)
    scene.kafka.delay = 4.0
    confirmation = order(pod, "confirm", "first")
    scene.wait(1.0)
    if confirmation.answer == "202":
        raise Violation("the pod gives up too early")
    pod.crash(60.0)
    scene.kafka.up = False
    scene.redis.become(before, restarted=False)
    scene.rebuild()
    scene.expire(HOLD)


def lose_a_call(scene: Scene, pod: Pod, verb: str, before: Keys) -> None:
    """Kills a pod half a second after a call, and lets Redis and Kafka lose the change."""
    scene.kafka.delay = 3.0
    order(pod, verb, "first")
    scene.wait(0.5)
    pod.crash(60.0)
    scene.kafka.up = False
    scene.redis.become(before, restarted=False)
    scene.rebuild()


# Versions, settling and recording.


def a_void_confirmation_settles_an_expiry(rules: Rules) -> None:
    """The lost confirmation and the expiry after the rebuild have the same entry id."""
    scene = Scene(rules, stock=1, hold=HOLD)
    scene.record(scene.buy("first"))
    before = scene.redis.keys.copy()
    entry, void = scene.confirm("first")
    scene.redis.become(before, restarted=False)
    scene.rebuild()
    scene.expire(HOLD)  # its pod dies
    scene.redis.settle([(entry, void)])
    scene.record(void, scene.buy("second"))
    scene.judge()


def a_refused_reservation_is_accepted_again(rules: Rules) -> None:
    """A receiver of recorded reservations gets the refusal and the acceptance of one key."""
    scene = Scene(rules, stock=1, hold=HOLD)
    before = scene.redis.keys.copy()
    cut_off = scene.buy("first")
    scene.redis.become(before, restarted=False)
    scene.rebuild()
    scene.record(cut_off)
    scene.record(scene.buy("first"))
    scene.judge()


def a_released_unit_is_sold_before_kafka_has_the_release(rules: Rules) -> None:
    """The pod of the cancellation dies, and Redis loses the cancellation."""
    scene = Scene(rules, stock=1, hold=HOLD)
    scene.record(scene.buy("first"))
    before = scene.redis.keys.copy()
    scene.cancel("first")
    scene.record(scene.buy("second"))
    scene.redis.become(before, restarted=False)
    scene.rebuild()
    scene.judge()


def a_late_settlement_meets_a_release(rules: Rules) -> None:
    """The acknowledged entry is lost, and the release of its reservation gets the same entry id."""
    scene = Scene(rules, stock=1, hold=HOLD)
    before = scene.redis.keys.copy()
    accepted = scene.buy("first")
    entry = scene.redis.keys.last_entry
    if accepted is None:
        raise Violation("the first unit is not sold")
    scene.ledger.record({}, {}, [accepted])
    scene.redis.become(before, restarted=False)
    scene.rebuild()
    scene.cancel("first")
    scene.redis.settle([(entry, accepted)])
    scene.record(scene.buy("second"))
    scene.judge()


def a_void_event_and_its_successor_share_a_batch(rules: Rules) -> None:
    """Pods of the previous release give version 1 to each acceptance of a key."""
    scene = Scene(replace(rules, unique_versions=False), stock=1, hold=HOLD)
    before = scene.redis.keys.copy()
    cut_off = scene.buy("first")
    scene.redis.become(before, restarted=False)
    scene.rebuild()
    scene.record(cut_off, scene.buy("first"))
    scene.judge()


def a_void_cancellation_comes_late(rules: Rules) -> None:
    """The hold of a lost cancellation is confirmed after the rebuild, and keeps its unit."""
    scene = Scene(rules, stock=1, hold=HOLD)
    scene.record(scene.buy("first"))
    before = scene.redis.keys.copy()
    _, void = scene.cancel("first")
    scene.redis.become(before, restarted=False)
    scene.rebuild()
    scene.record(void)
    scene.record(scene.confirm("first")[1])
    scene.judge()


# Rebuilding and freeing.


def a_lost_confirmation_is_repeated(rules: Rules) -> None:
    """The hold's time is over when the rebuild ends, and the shop has only a 202."""
    scene = Scene(rules, stock=1, hold=HOLD)
    scene.record(scene.buy("first"))
    before = scene.redis.keys.copy()
    scene.world.now += HOLD - 1.0
    scene.confirm("first")
    scene.redis.become(before, restarted=False)
    scene.rebuild()
    scene.redis.expire(3)
    scene.confirm("first")


def a_second_order_comes_after_a_rebuild(rules: Rules) -> None:
    """The reservation is confirmed for the first order."""
    scene = Scene(rules, stock=1, hold=HOLD)
    scene.record(scene.buy("first"))
    scene.record(scene.confirm("first")[1])
    scene.redis.become(Keys())
    scene.rebuild()
    if scene.redis.confirm("first", "another order").outcome != "other_order":
        raise Violation("a second order takes the reservation")


def a_hoarder_returns_after_a_rebuild(rules: Rules) -> None:
    """The buyer has let as many holds expire as a buyer may."""
    scene = Scene(rules, stock=1, hold=HOLD)
    for number in range(MAX_EXPIRED_HOLDS):
        scene.record(scene.buy(f"hold {number}", user="hoarder"))
        scene.record(*scene.expire(HOLD))
    scene.redis.become(Keys())
    scene.rebuild()
    if scene.buy("one more", user="hoarder") is not None:
        raise Violation("the hoarder has another hold")


def a_buyer_has_three_declined_cards(rules: Rules) -> None:
    """The shop cancels each of the holds."""
    scene = Scene(rules, stock=1, hold=HOLD)
    for number in range(MAX_EXPIRED_HOLDS):
        name = f"hold {number}"
        scene.record(scene.buy(name, user="buyer"))
        scene.record(scene.cancel(name)[1])
    if scene.buy("paid", user="buyer") is None:
        raise Violation("the buyer is refused")


def an_older_copy_in_the_same_run_lacks_a_confirmation(rules: Rules) -> None:
    """A snapshot of the whole machine is restored. It has as many accepted units as the ledger."""
    scene = Scene(rules, stock=1, hold=HOLD)
    scene.record(scene.buy("first"))
    former = scene.redis.keys.copy()
    scene.record(scene.confirm("first")[1])
    scene.world.oracle.confirmed["first"] = "order"
    scene.redis.keys = former
    scene.operator.begin()
    scene.wait(3 * HOLD)
    scene.redis.expire(3)


def a_sale_is_freed_before_its_last_expiry_is_recorded(rules: Rules) -> None:
    """Kafka has the expiry, and the ledger has not read it yet."""
    scene = Scene(rules, stock=1, hold=HOLD)
    scene.record(scene.buy("first"))
    scene.expire(HOLD)
    entries = [(entry, event) for entry, (event, _) in scene.redis.keys.outbox.items()]
    scene.redis.settle(entries)
    scene.declare(1, "closed")
    row = scene.ledger.tables.row
    if row is not None and scene.redis.free(row) == "freed":
        scene.operator.begin()
        scene.wait(3.0)
        if scene.redis.keys.sale is not None:
            raise Violation("a sale that was freed is rebuilt")


HOLD_SCHEDULES: Final[tuple[tuple[str, Callable[[Rules], None]], ...]] = (
    ("expiry_has_grace", a_buyer_pays_in_the_last_second),
    ("unpaid_order_is_set", a_shop_refunds_an_order_without_a_hold),
    ("limit_spares_changes", the_outbox_is_full_when_a_buyer_pays),
    ("ends_recorded", a_refused_hold_ends),
    ("refused_versions_grow", a_refused_reservation_is_confirmed),
    ("late_acknowledgements_ignored", kafka_acknowledges_after_a_rebuild),
    ("confirmation_waits", a_confirmation_is_answered_before_kafka_has_it),
    ("cancellation_waits", a_refund_is_answered_before_kafka_has_it),
    ("repeats_wait", a_repeated_confirmation_is_only_in_redis),
    ("orders_need_a_heartbeat", a_replaced_primary_is_asked_about_an_order),
    ("memory_by_version", an_acknowledgement_of_another_event),
    ("unique_versions", a_void_confirmation_settles_an_expiry),
    ("unique_versions", a_refused_reservation_is_accepted_again),
    ("refused_may_return", a_refused_reservation_is_accepted_again),
    ("release_when_acknowledged", a_released_unit_is_sold_before_kafka_has_the_release),
    ("settle_matches_version", a_late_settlement_meets_a_release),
    ("void_before_fold", a_void_event_and_its_successor_share_a_batch),
    ("void_changes_dropped", a_void_cancellation_comes_late),
    ("holds_extended", a_lost_confirmation_is_repeated),
    ("orders_restored", a_second_order_comes_after_a_rebuild),
    ("expired_counts_restored", a_hoarder_returns_after_a_rebuild),
    ("only_expiry_counts", a_buyer_has_three_declined_cards),
    ("decided_units_compared", an_older_copy_in_the_same_run_lacks_a_confirmation),
    ("freed_if_all_recorded", a_sale_is_freed_before_its_last_expiry_is_recorded),
)
"""Parts of the holds, each with a schedule that needs it."""
