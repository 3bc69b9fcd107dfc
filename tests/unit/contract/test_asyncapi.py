"""docs/asyncapi.yaml describes the messages of both topics exactly."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema_rs import Draft7Validator

from flashsale import events
from flashsale.errors import ContractViolation
from flashsale.events import Event
from flashsale.requirements import EVENT_RETENTION_MS, PARTITIONS
from flashsale_consumer.recorded import Rebuild, Reservation
from tests.support import asyncapi

SPECIFICATION = "github.com/asyncapi/spec-json-schemas/v6@v6.11.1"
"""AsyncAPI's own JSON Schemas, as a Go module."""
SCHEMAS = asyncapi.document()["components"]["schemas"]
EXAMPLE = asyncapi.document()["components"]["messages"]["reservation"]["examples"][0]


@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go to fetch AsyncAPI's schema")
def test_the_document_is_valid_asyncapi_3() -> None:
    done = subprocess.run(
        ["go", "mod", "download", "-json", SPECIFICATION],
        capture_output=True,
        text=True,
        check=True,
    )
    schema = json.loads((Path(json.loads(done.stdout)["Dir"]) / "schemas/3.0.0.json").read_text())
    validator = Draft7Validator(schema)
    validator.validate(asyncapi.document())
    assert not validator.is_valid(asyncapi.document() | {"channels": {"recorded": {"address": 1}}})


def test_the_topics_are_the_engines() -> None:
    recorded, reservations = (
        asyncapi.document()["channels"][name] for name in ("recorded", "reservations")
    )
    assert recorded["address"] == events.recorded_topic()
    assert reservations["address"] == events.topic()
    binding = recorded["bindings"]["kafka"]
    assert binding["partitions"] == PARTITIONS
    assert binding["topicConfiguration"]["retention.ms"] == EVENT_RETENTION_MS
    assert "internal" in reservations["description"].lower()


@pytest.mark.parametrize(
    ("name", "kind"), [("Event", Event), ("Reservation", Reservation), ("Rebuild", Rebuild)]
)
def test_each_schema_has_exactly_the_fields_of_the_code(
    name: str, kind: type[msgspec.Struct]
) -> None:
    fields = msgspec.structs.fields(kind)
    assert set(SCHEMAS[name]["properties"]) == {field.encode_name for field in fields}
    assert set(SCHEMAS[name]["required"]) == {
        field.encode_name for field in fields if field.required
    }
    for field in fields:
        if field.name in ("state", "verdict"):
            assert SCHEMAS[name]["properties"][field.encode_name]["enum"] == list(
                get_args(field.type)
            )


def test_the_example_is_a_message() -> None:
    asyncapi.check("reservation", EXAMPLE["headers"], EXAMPLE["payload"])
    msgspec.convert(EXAMPLE["payload"], Reservation)


@pytest.mark.parametrize(
    "change",
    [
        {"state": "accepted"},
        {"verdict": "refused"},
        {"state": "refused"},
        {"version": 0},
        {"quantity": 0},
        {"expiresAt": "soon"},
        {"saleId": "iphone-15"},
        {"unknown": 1},
    ],
)
def test_a_message_that_the_consumer_never_makes_is_not_described(change: dict[str, Any]) -> None:
    assert asyncapi.describes("reservation", EXAMPLE["headers"], EXAMPLE["payload"])
    assert not asyncapi.describes("reservation", EXAMPLE["headers"], EXAMPLE["payload"] | change)


def test_a_reader_of_this_version_accepts_the_fields_and_headers_of_a_later_one() -> None:
    rebuild = {"saleId": "shop/phone", "itemId": "phone", "revision": 1, "lost": 0}
    headers = EXAMPLE["headers"] | {"ce_type": "dev.flashsale.sale.rebuilt.v1"}
    for message, own, payload in (
        ("reservation", EXAMPLE["headers"], EXAMPLE["payload"]),
        ("rebuilt", headers, rebuild),
    ):
        for part, data in (("headers", own), ("payload", payload)):
            asyncapi.validator(message, part, closed=False).validate(data | {"added": "x"})
            assert not asyncapi.validator(message, part).is_valid(data | {"added": "x"})


@given(st.data())
def test_the_events_that_the_code_reads_are_described(data: st.DataObject) -> None:
    """A value that one of them accepts and the other refuses fails the test."""
    event = {
        "schema": 1,
        "reservationId": EXAMPLE["payload"]["reservationId"],
        "saleId": "shop/phone",
        "itemId": "phone",
        "userId": "ann",
        "quantity": 1,
        "state": "held",
        "version": 1,
        "occurredAt": "2026-11-27T12:00:00Z",
        "allocated": 1,
        "capacity": 1,
        "revision": 1,
    }
    name = data.draw(st.sampled_from([*event, "requestKey", "engine", "orderRef"]))
    value = data.draw(
        st.one_of(
            st.none(),
            st.integers(-2, 2**53 + 2),
            st.text(max_size=140),
            st.text("az-./09~", max_size=140),
            st.sampled_from(["held", "confirmed", "cancelled", "expired", "refused"]),
        )
    )
    changed = event | {name: value}
    headers = {"content-type": "application/json", "schema": "1"}
    try:
        events.decode(msgspec.json.encode(changed))
    except ContractViolation:
        accepted = False
    else:
        accepted = True
    if value is None:
        return  # an absent value can be null when it is read, but is left out when it is written
    assert asyncapi.describes("event", headers, changed) == accepted
