"""Every refusal of a script, and every failure of the API, has a problem."""

from itertools import chain

from flashsale.reservations import Outcome, Transition
from flashsale_api.calls import Failure
from flashsale_api.responses import PROBLEMS, Problem


def test_every_refusal_has_a_problem() -> None:
    done = {Outcome.ACCEPTED, Outcome.REPLAYED, Transition.CHANGED}
    words = set(chain(Outcome, Transition, Failure)) - done
    assert words <= PROBLEMS.keys()


def test_a_sale_that_no_pod_can_use_is_answered_like_a_fenced_one() -> None:
    words = (Transition.FENCED, Transition.UNSUPPORTED, Transition.UNREADABLE)
    assert {PROBLEMS[word] for word in words} == {Problem.FENCED}
