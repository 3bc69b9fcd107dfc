"""Bad manifests, with the messages of flashsalectl and the reaction of the CRD."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tests.support.manifests import flash_sale

STOCK = "spec.stock: must be an integer from 0 to 100000000"
PER_USER = "spec.maxPerUser: must be an integer from 1 to 1000"
HOLD = "spec.holdSeconds: must be an integer from 1 to 86400"
EXPIRED_HOLDS = "spec.maxExpiredHolds: must be an integer from 1 to 1000"
ITEM = (
    "spec.itemId: must be 1 to 128 of the characters A-Z a-z 0-9 . _ ~ - and begin with a letter "
    "or a digit"
)
DISPLAY_NAME = "spec.displayName: must be 1 to 128 characters, none of them a control character"
TIME = (
    "must be an RFC 3339 time with an offset in the years 2000 to 2999, such as "
    "2026-11-27T09:00:00Z"
)
QUOTES = "must be text, so put it in quotes"
STARTS, ENDS = f"spec.startsAt: {TIME}", f"spec.endsAt: {TIME}"
ORDER = "spec.endsAt: must be after spec.startsAt"
PAUSED = "spec.paused: must be true or false"
NAME = (
    "metadata.name: must be a DNS-1123 name: at most 253 characters, lower-case letters, digits, "
    "- and ."
)
NAMESPACE = (
    "metadata.namespace: must be a DNS-1123 label: at most 63 characters, lower-case letters, "
    "digits and -"
)


class Server(StrEnum):
    """The kube-apiserver's reaction to a request of kubectl (`--validate=strict`)."""

    REFUSES = "refuses"
    REFUSES_OR_PRUNES = "refuses, or prunes the field if asked without validation"
    ACCEPTS = "accepts"


@dataclass(frozen=True)
class Bad:
    """Changes to a good manifest. `ABSENT` removes a field."""

    mistakes: tuple[str, ...]
    spec: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    server: Server = Server.REFUSES


ABSENT = object()

BAD_MANIFESTS = {
    "stock_below_zero": Bad((STOCK,), {"stock": -1}),
    "stock_too_large": Bad((STOCK,), {"stock": 100_000_001}),
    "stock_huge": Bad((STOCK,), {"stock": 10**30}),
    "stock_a_float": Bad((STOCK,), {"stock": 100.5}),
    "stock_text": Bad((STOCK,), {"stock": "100"}),
    "stock_a_boolean": Bad((STOCK,), {"stock": True}),
    "stock_null": Bad((STOCK,), {"stock": None}),
    "stock_a_list": Bad((STOCK,), {"stock": [100]}),
    "stock_absent": Bad(("spec.stock: is required",), {"stock": ABSENT}),
    "per_user_zero": Bad((PER_USER,), {"maxPerUser": 0}),
    "per_user_too_many": Bad((PER_USER,), {"maxPerUser": 1001}),
    "per_user_a_boolean": Bad((PER_USER,), {"maxPerUser": True}),
    "per_user_text": Bad((PER_USER,), {"maxPerUser": "1"}),
    "item_absent": Bad(("spec.itemId: is required",), {"itemId": ABSENT}),
    "item_empty": Bad((ITEM,), {"itemId": ""}),
    "item_with_a_brace": Bad((ITEM,), {"itemId": "a{b}"}),
    "item_with_a_newline": Bad((ITEM,), {"itemId": "iphone\n"}),
    "item_begins_with_a_dot": Bad((ITEM,), {"itemId": ".a"}),
    "item_too_long": Bad((ITEM,), {"itemId": "a" * 129}),
    "item_a_number": Bad((f"spec.itemId: {QUOTES}",), {"itemId": 15}),
    "display_name_empty": Bad((DISPLAY_NAME,), {"displayName": ""}),
    "display_name_too_long": Bad((DISPLAY_NAME,), {"displayName": "é" * 129}),
    "display_name_with_a_tab": Bad((DISPLAY_NAME,), {"displayName": "a\tb"}),
    "display_name_with_a_newline": Bad((DISPLAY_NAME,), {"displayName": "a\n"}),
    "display_name_a_number": Bad((f"spec.displayName: {QUOTES}",), {"displayName": 15}),
    "start_without_offset": Bad((STARTS,), {"startsAt": "2026-11-27T09:00:00"}),
    "start_a_date": Bad((STARTS,), {"startsAt": "2026-11-27"}),
    "start_with_a_space": Bad((STARTS,), {"startsAt": "2026-11-27 09:00:00Z"}),
    "start_a_number": Bad((STARTS,), {"startsAt": 1795770000}),
    "start_on_no_day": Bad((STARTS,), {"startsAt": "2026-02-30T09:00:00Z"}),
    "start_in_antiquity": Bad((STARTS,), {"startsAt": "0044-03-15T09:00:00Z"}),
    "start_in_small_letters": Bad((STARTS,), {"startsAt": "2026-11-27t09:00:00z"}),
    "start_with_a_comma": Bad((STARTS,), {"startsAt": "2026-11-27T09:00:00,5Z"}),
    "start_to_the_picosecond": Bad((STARTS,), {"startsAt": "2026-11-27T09:00:00.000000000001Z"}),
    "start_in_the_year_3000": Bad((STARTS,), {"startsAt": "3000-01-01T00:00:00Z"}),
    "start_a_day_off": Bad((STARTS,), {"startsAt": "2026-11-27T09:00:00+24:00"}),
    "start_ends_with_a_newline": Bad((STARTS,), {"startsAt": "2026-11-27T09:00:00Z\n"}),
    "end_on_february_29_of_no_leap_year": Bad((ENDS,), {"endsAt": "2027-02-29T09:00:00Z"}),
    "end_in_a_leap_second": Bad((ENDS,), {"endsAt": "2026-12-31T23:59:60Z"}),
    "end_at_24_hours": Bad((ENDS,), {"endsAt": "2026-11-27T24:00:00Z"}),
    "end_within_the_millisecond": Bad(
        (ORDER,),
        {"startsAt": "2026-11-27T09:00:00.0001Z", "endsAt": "2026-11-27T09:00:00.0009Z"},
    ),
    "end_at_no_hour": Bad((ENDS,), {"endsAt": "2026-11-27T25:00:00Z"}),
    "end_before_start": Bad(
        (ORDER,), {"startsAt": "2026-11-27T09:00:00Z", "endsAt": "2026-11-27T08:59:59Z"}
    ),
    "end_at_start_elsewhere": Bad(
        (ORDER,), {"startsAt": "2026-11-27T09:00:00Z", "endsAt": "2026-11-27T10:00:00+01:00"}
    ),
    "paused_text": Bad((PAUSED,), {"paused": "yes"}),
    "paused_a_number": Bad((PAUSED,), {"paused": 1}),
    "field_misspelt": Bad(
        ("spec.stocks: unknown field",), {"stocks": 1}, server=Server.REFUSES_OR_PRUNES
    ),
    "hold_zero": Bad((HOLD,), {"holdSeconds": 0}),
    "hold_too_long": Bad((HOLD,), {"holdSeconds": 86_401}),
    "hold_a_float": Bad((HOLD,), {"holdSeconds": 1.5}),
    "hold_a_boolean": Bad((HOLD,), {"holdSeconds": True}),
    "hold_text": Bad((HOLD,), {"holdSeconds": "60"}),
    "hold_a_duration": Bad((HOLD,), {"holdSeconds": "10m"}),
    "expired_holds_zero": Bad((EXPIRED_HOLDS,), {"maxExpiredHolds": 0}),
    "expired_holds_too_many": Bad((EXPIRED_HOLDS,), {"maxExpiredHolds": 1001}),
    "expired_holds_text": Bad((EXPIRED_HOLDS,), {"maxExpiredHolds": "3"}),
    "expired_holds_a_boolean": Bad((EXPIRED_HOLDS,), {"maxExpiredHolds": True}),
    "field_of_a_later_version": Bad(
        ("spec.waitingRoom: unknown field",),
        {"waitingRoom": 60},
        server=Server.REFUSES_OR_PRUNES,
    ),
    "name_with_upper_case": Bad((NAME,), metadata={"name": "IPhone"}),
    "name_with_an_underscore": Bad((NAME,), metadata={"name": "iphone_15"}),
    "name_too_long": Bad((NAME,), metadata={"name": ".".join(["a" * 63] * 4)}),
    "name_absent": Bad(("metadata.name: is required",), metadata={"name": ABSENT}),
    "name_ends_with_a_newline": Bad((NAME,), metadata={"name": "iphone\n"}),
    "namespace_with_a_dot": Bad((NAMESPACE,), metadata={"namespace": "a.b"}),
    # The kube-apiserver makes a name. Without it, repeated applies would start more sales.
    "name_generated": Bad(
        ("metadata.name: is required",),
        metadata={"name": ABSENT, "generateName": "iphone-"},
        server=Server.ACCEPTS,
    ),
    "metadata_field_misspelt": Bad(
        ("metadata.lables: unknown field",),
        metadata={"lables": {"team": "phones"}},
        server=Server.REFUSES_OR_PRUNES,
    ),
    "another_kind": Bad(("kind: must be FlashSale",), top={"kind": "FlashSail"}),
    "another_version": Bad(
        ("apiVersion: must be flashsale.dev/v1alpha1",), top={"apiVersion": "flashsale.dev/v1"}
    ),
    "no_spec": Bad(("spec: is required",), top={"spec": ABSENT}),
    "spec_a_list": Bad(("spec: must be a mapping",), top={"spec": []}),
    "metadata_text": Bad(("metadata: must be a mapping",), top={"metadata": "iphone"}),
    "spec_on_top": Bad(
        ("stock: unknown field",), top={"stock": 100}, server=Server.REFUSES_OR_PRUNES
    ),
    "everything_at_once": Bad(
        ("spec.color: unknown field", ITEM, STOCK, PER_USER, ENDS),
        {"itemId": "", "stock": -1, "maxPerUser": 0, "endsAt": "never", "color": "red"},
    ),
}


def manifest(bad: Bad = Bad(())) -> dict[str, Any]:
    """Returns the manifest as YAML and the kube-apiserver parse it."""
    good = flash_sale("iphone-15", "iphone_15", stock=100)
    parts = {
        "metadata": _with(good["metadata"], bad.metadata),
        "spec": _with(good["spec"], bad.spec),
    }
    return _with(good | parts, bad.top)


def _with(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    changed = fields | changes
    return {name: value for name, value in changed.items() if value is not ABSENT}
