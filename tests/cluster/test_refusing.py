"""The kube-apiserver and flashsalectl accept and refuse the same manifests."""

import json

import pytest

from dev.cluster.control_plane import ControlPlane
from flashsale_operator.sales import manifest as manifests
from tests.support.bad_manifests import BAD_MANIFESTS, Bad, Server, manifest

pytestmark = pytest.mark.slow

GOOD = {
    "least": {"stock": 0},
    "most": {"stock": 100_000_000, "maxPerUser": 1000, "displayName": "é" * 128},
    "item": {"itemId": "A" + "9._~-" * 25 + "ab"},
    "window": {"startsAt": "2026-11-27T09:00:00Z", "endsAt": "2026-11-27T09:00:00.001Z"},
    "window_across_a_millisecond": {
        "startsAt": "2026-11-27T09:00:00.0009Z",
        "endsAt": "2026-11-27T09:00:00.0011Z",
    },
    "offsets": {"startsAt": "2026-11-27T09:00:00+05:30", "endsAt": "2026-11-27T09:00:00-23:59"},
    "leap_day": {"startsAt": "2028-02-29T00:00:00.123456789Z"},
    "nulls_with_defaults": {"maxPerUser": None, "paused": None},
    "nulls_without": {"displayName": None, "startsAt": None, "endsAt": None},
    "paused": {"paused": True, "endsAt": "2999-12-31T23:59:59Z"},
}


def ask(plane: ControlPlane, given: object, validate: str = "strict") -> tuple[bool, str]:
    """Return whether the kube-apiserver accepts an object, and its answer."""
    done = plane.kubectl(
        "create",
        "--dry-run=server",
        f"--validate={validate}",
        "--output=json",
        "--filename=-",
        stdin=json.dumps(given),
    )
    return done.returncode == 0, done.stdout or done.stderr


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_both_judge_a_wrong_manifest_alike(plane: ControlPlane, name: str) -> None:
    bad = BAD_MANIFESTS[name]
    accepted, answer = ask(plane, manifest(bad))
    assert accepted == (bad.server is Server.ACCEPTS), answer
    assert "rule evaluation error" not in answer
    assert "panic" not in answer


@pytest.mark.parametrize(
    "name", [name for name, bad in BAD_MANIFESTS.items() if bad.server is Server.REFUSES_OR_PRUNES]
)
def test_an_unknown_field_is_never_stored(plane: ControlPlane, name: str) -> None:
    bad = BAD_MANIFESTS[name]
    accepted, answer = ask(plane, manifest(bad), validate="ignore")
    assert accepted, answer
    stored = json.loads(answer)
    assert not set(bad.spec) & set(stored["spec"])
    assert not set(bad.top) & set(stored)


@pytest.mark.parametrize("name", GOOD)
def test_the_server_accepts_manifests_that_flashsalectl_accepts(
    plane: ControlPlane, name: str
) -> None:
    given = manifest()
    given["spec"] |= GOOD[name]
    spec = manifests.sale_spec(given)
    accepted, answer = ask(plane, given)
    assert accepted, answer
    stored = json.loads(answer)
    assert manifests.sale_spec(stored) == spec


@pytest.mark.parametrize("name", ["a", "a" * 64, "a" * 253, "0." * 126 + "a", "a--b.c"])
def test_both_accept_the_same_names(plane: ControlPlane, name: str) -> None:
    given = manifest(Bad((), metadata={"name": name}))
    assert manifests.sale_spec(given).sale_id == f"default/{name}"
    accepted, answer = ask(plane, given)
    assert accepted, answer


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("item_with_a_brace", "must be 1 to 128 of the characters A-Z a-z 0-9 . _ ~ - and begin"),
        ("display_name_with_a_tab", "none of them a control character"),
        ("end_before_start", "spec.endsAt: Invalid value"),
        ("end_before_start", "must be after spec.startsAt"),
        ("stock_too_large", "should be less than or equal to 100000000"),
        ("start_on_no_day", "must be an RFC 3339 time with an offset in the years 2000 to 2999,"),
        ("field_misspelt", 'unknown field "spec.stocks"'),
    ],
)
def test_a_refusal_states_the_rule(plane: ControlPlane, name: str, words: str) -> None:
    assert words in ask(plane, manifest(BAD_MANIFESTS[name]))[1]


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, bad in BAD_MANIFESTS.items()
        if name.startswith(("start_", "end_"))
        and all(type(each) is str for each in bad.spec.values())
    ],
)
def test_a_refused_time_is_answered_in_words(plane: ControlPlane, name: str) -> None:
    bad = BAD_MANIFESTS[name]
    refusal = ask(plane, manifest(bad))[1]
    assert "[0-9]" not in refusal
    assert "<nil>" not in refusal
    assert "evaluating rule" not in refusal
    (mistake,) = bad.mistakes
    assert refusal.count("Invalid value") == 1
    assert mistake.partition(":")[0] in refusal
