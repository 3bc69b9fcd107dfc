"""The values, their schema and their table, without Helm."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chart.values_table import CHART, README, defaults, readme, values

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").removeprefix("#/$defs/")
    found: dict[str, Any] = SCHEMA["$defs"][name] if name else schema
    return found


def objects(schema: object, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema of an object, wherever it is."""
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield path, schema
        for key, inner in schema.items():
            yield from objects(inner, f"{path}/{key}")
    elif isinstance(schema, list):
        for number, inner in enumerate(schema):
            yield from objects(inner, f"{path}/{number}")


def test_the_table_in_the_readme_is_what_the_values_say() -> None:
    assert README.read_text() == readme(), "run: python -m tests.chart.values_table"


def test_every_value_is_explained() -> None:
    assert [value.path for value in values() if not value.description] == []


def test_no_object_of_the_schema_takes_what_it_does_not_know() -> None:
    open_ones = [
        path for path, schema in objects(SCHEMA) if schema.get("additionalProperties") is not False
    ]
    # Helm adds `global` to a chart within another, and an annotation may have any name.
    assert open_ones == ["/properties/global", "/$defs/annotations"]


@pytest.mark.parametrize("value", list(values()), ids=lambda value: value.path)
def test_the_schema_knows_every_value(value: Any) -> None:  # noqa: ANN401 - a Value
    schema = SCHEMA
    for key in value.path.split("."):
        assert key in resolved(schema)["properties"], value.path
        schema = resolved(schema)["properties"][key]


def test_every_value_of_the_schema_has_a_default() -> None:
    def missing(schema: dict[str, Any], given: Any, path: str = "") -> Iterator[str]:  # noqa: ANN401
        for key, inner in resolved(schema).get("properties", {}).items():
            if key not in given:
                yield f"{path}{key}"
            elif isinstance(given[key], dict):
                yield from missing(inner, given[key], f"{path}{key}.")

    # Nobody has a CPU limit unless they ask for it.
    expected = ["global", *(f"{each}.resources.limits.cpu" for each in ("api", "consumer"))]
    assert list(missing(SCHEMA, defaults())) == [*expected, "operator.resources.limits.cpu"]
