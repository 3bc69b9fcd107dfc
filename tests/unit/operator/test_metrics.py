"""What the operator tells of a sale's way into the ledger."""

from flashsale_operator.kubernetes.metrics import Backlog


def test_a_unit_that_is_recorded_at_the_next_look_has_waited_for_no_time() -> None:
    backlog = Backlog()
    backlog.sample(0, accepted=5, recorded=4)
    backlog.sample(5, accepted=9, recorded=8)
    assert backlog.seconds(5) == 0
    backlog.sample(10, accepted=9, recorded=9)
    assert backlog.seconds(60) == 0


def test_the_oldest_unit_that_is_not_recorded_counts() -> None:
    backlog = Backlog()
    for second in range(0, 50, 5):
        backlog.sample(second, accepted=10 + second, recorded=10)
    assert backlog.seconds(50) == 45
    backlog.sample(50, accepted=100, recorded=40)
    assert backlog.seconds(50) == 15
    backlog.sample(55, accepted=100, recorded=100)
    assert backlog.seconds(55) == 0


def test_units_wait_also_while_the_ledger_does_not_say() -> None:
    backlog = Backlog()
    backlog.sample(0, accepted=5, recorded=5)
    backlog.sample(5, accepted=5, recorded=None)
    assert backlog.seconds(60) == 0
    backlog.sample(60, accepted=6, recorded=None)
    assert backlog.seconds(90) == 30


def test_units_that_redis_lost_do_not_wait() -> None:
    backlog = Backlog()
    backlog.sample(0, accepted=5, recorded=3)
    backlog.sample(5, accepted=3, recorded=3)
    assert backlog.seconds(60) == 0
    backlog.sample(60, accepted=4, recorded=3)
    assert backlog.seconds(70) == 10
