"""The description of both topics' messages, and the comparison of it with real messages."""

from copy import deepcopy
from functools import cache
from typing import Any, Final

import yaml
from aiokafka import ConsumerRecord
from jsonschema_rs import Draft7Validator

from tests.support.paths import DOCS

DOCUMENT: Final = DOCS / "asyncapi.yaml"
RECORDED: Final = ("reservation", "rebuilt")
OPEN: Final = ("CloudEvent", "Reservation", "Rebuild")
"""The schemas to which a later version can add fields."""
EVENT: Final = "event"


@cache
def document() -> dict[str, Any]:
    """Return the document."""
    found: dict[str, Any] = yaml.safe_load(DOCUMENT.read_text())
    return found


@cache
def validator(message: str, part: str, *, closed: bool = True) -> Draft7Validator:
    """Return the validator of a message's `headers` or `payload`.

    It is as strict as a reader's. With `closed` it also refuses what the document does not name.
    """
    components = deepcopy(document()["components"])
    if closed:
        for name in OPEN:
            components["schemas"][name]["additionalProperties"] = False
    reference = {"$ref": f"#/components/messages/{message}/{part}"}
    schema = {"components": components, "allOf": [reference]}
    return Draft7Validator(schema, validate_formats=True)


def describes(message: str, headers: dict[str, str], payload: Any) -> bool:  # noqa: ANN401 - JSON
    """Whether the document allows a message."""
    return validator(message, "headers").is_valid(headers) and validator(
        message, "payload"
    ).is_valid(payload)


def check(message: str, headers: dict[str, str], payload: Any) -> None:  # noqa: ANN401 - JSON
    """Check a message. Raises `jsonschema_rs.ValidationError`."""
    validator(message, "headers").validate(headers)
    validator(message, "payload").validate(payload)


def headers_of(record: ConsumerRecord) -> dict[str, str]:
    """Return a record's headers as text."""
    return {name: value.decode() for name, value in record.headers}
