"""The kube-apiserver refuses what flashsalectl refuses, and takes what it takes."""

import json

import pytest

from dev.cluster.control_plane import ControlPlane
from flashsale_operator.sales import manifest as manifests
from tests.support.bad_manifests import BAD_MANIFESTS, Server, manifest

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
    """Whether the kube-apiserver takes an object, and what it says or makes of it."""
    done = plane.kubectl(
        *("create", "--dry-run=server", f"--validate={validate}", "-o", "json", "-f", "-"),
        stdin=json.dumps(given),
    )
    return done.returncode == 0, done.stdout or done.stderr


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_a_mistake_has_the_same_verdict(plane: ControlPlane, name: str) -> None:
    bad = BAD_MANIFESTS[name]
    taken, said = ask(plane, manifest(bad))
    assert taken == (bad.server is Server.TAKES), said
    assert "rule evaluation error" not in said
    assert "panic" not in said


@pytest.mark.parametrize(
    "name", [name for name, bad in BAD_MANIFESTS.items() if bad.server is Server.REFUSES_OR_PRUNES]
)
def test_a_field_that_nobody_knows_is_never_stored(plane: ControlPlane, name: str) -> None:
    bad = BAD_MANIFESTS[name]
    taken, said = ask(plane, manifest(bad), validate="ignore")
    assert taken, said
    stored = json.loads(said)
    assert not set(bad.spec) & set(stored["spec"])
    assert not set(bad.top) & set(stored)


@pytest.mark.parametrize("name", GOOD)
def test_what_flashsalectl_takes_is_taken(plane: ControlPlane, name: str) -> None:
    given = manifest()
    given["spec"] |= GOOD[name]
    spec = manifests.sale_spec(given)
    taken, said = ask(plane, given)
    assert taken, said
    stored = json.loads(said)
    assert manifests.sale_spec(stored) == spec


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("item_with_a_brace", "must be 1 to 128 of the characters A-Z a-z 0-9 . _ ~ - and begin"),
        ("display_name_with_a_tab", "none of them a control character"),
        ("end_before_start", "spec.endsAt: Invalid value"),
        ("end_before_start", "must be after spec.startsAt"),
        ("stock_too_large", "should be less than or equal to 100000000"),
        ("start_on_no_day", "spec.startsAt in body must be of type date-time"),
        ("field_misspelt", 'unknown field "spec.stocks"'),
    ],
)
def test_a_refusal_is_in_words(plane: ControlPlane, name: str, words: str) -> None:
    assert words in ask(plane, manifest(BAD_MANIFESTS[name]))[1]
