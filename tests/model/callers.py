"""Buyers and the shop's order service in the model, as sequences of steps."""

from collections.abc import Generator

from tests.model.pods import Asked, Ordered, Pod
from tests.model.records import CONFIRMED, HELD, Request
from tests.model.world import Steps, World

RETRIED = {"", "unavailable", "fenced", "unknown", "202"}
"""Answers after which the order service repeats its call."""


def buy(
    world: World, pods: list[Pod], request: Request, *, keyed: bool, order: str, hold: float
) -> Steps:
    """A buyer, who retries, maybe on another pod. Without a key each attempt is a new request.

    The order service takes over once there is a hold, which lasts about `hold` seconds.
    """
    sent, asked = request, Asked(request)
    ordered = False
    for attempt in range(1 + int(world.chance() * 5)):
        if not keyed:
            sent = request._replace(reservation_id=f"{request.reservation_id}.{attempt}")
        asked = Asked(sent)
        _one_of(world, pods).ask(asked)
        for _ in range(4):
            yield world.between(0.3, 0.75)
            if asked.answer:
                break
        if asked.state == HELD and not ordered:
            ordered = True
            world.later(0.0, sell(world, pods, sent.reservation_id, order, hold))
            if world.chance() < 0.1:  # two orders race for the reservation
                other = sell(world, pods, sent.reservation_id, f"other {order}", hold)
                world.later(0.0, other)
            if world.chance() < 0.6:
                break
        patient = asked.answer in {"", "unavailable", "fenced", "sold_out"}
        if world.chance() < (0.1 if patient else 0.8):
            break
    if asked.state == CONFIRMED and world.chance() < 0.5:
        world.later(0.0, sell(world, pods, sent.reservation_id, order, hold))
    if keyed and world.chance() < 0.3:  # later repeats the request to check the reservation
        yield world.between(2.0, 15.0)
        _one_of(world, pods).ask(Asked(sent))


def sell(world: World, pods: list[Pod], reservation_id: str, order: str, hold: float) -> Steps:
    """The order service with one order: it confirms, cancels, repeats itself or forgets it."""
    fate = world.chance()
    if fate < 0.15:  # the buyer never pays
        return
    if world.aimed:
        yield world.between(0.0, min(hold, 6.0))
    else:
        yield world.between(0.0, hold * 1.3) if world.chance() < 0.7 else hold * 1.1
    if fate < 0.35:
        yield from _insist(world, pods, Ordered("cancel", reservation_id, None))
        return
    answer = yield from _insist(world, pods, Ordered("confirm", reservation_id, order))
    if answer == "200":
        if world.chance() < 0.3:
            yield world.between(0.5, 15.0)
            yield from _insist(world, pods, Ordered("confirm", reservation_id, order))
        if world.chance() < 0.2:
            yield world.between(0.5, 10.0)
            yield from _insist(world, pods, Ordered("cancel", reservation_id, None))
        if world.chance() < 0.3:  # a refund
            yield world.between(0.5, 10.0)
            yield from _insist(world, pods, Ordered("cancel", reservation_id, order))
    elif world.chance() < 0.4:
        yield from _insist(world, pods, Ordered("cancel", reservation_id, order))


def _insist(world: World, pods: list[Pod], wanted: Ordered) -> Generator[float, None, str]:
    """Calls until there is an answer, or for as long as the order service is patient."""
    answer = ""
    if wanted.verb == "cancel" and wanted.order_ref is not None:
        world.oracle.named.add((wanted.reservation_id, wanted.order_ref))
    for _ in range(1 + int(world.chance() * 8)):
        ordered = Ordered(wanted.verb, wanted.reservation_id, wanted.order_ref)
        _one_of(world, pods).order(ordered)
        for _ in range(8):
            yield 0.4
            if ordered.answer:
                break
        answer = ordered.answer
        if answer not in RETRIED:
            break
        yield world.between(0.2, 2.0)
    return answer


def _one_of(world: World, pods: list[Pod]) -> Pod:
    return pods[int(world.chance() * len(pods))]
