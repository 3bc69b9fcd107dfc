"""values.yaml, its schema and the tables in the README agree. Needs no Helm."""

import json
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.support.chart_values import README, defaults, readme, values
from tests.support.paths import CHART

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").removeprefix("#/$defs/")
    found: dict[str, Any] = SCHEMA["$defs"][name] if name else schema
    return found


def objects(schema: object, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every schema of an object with its path."""
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield path, schema
        for key, inner in schema.items():
            yield from objects(inner, f"{path}/{key}")
    elif isinstance(schema, list):
        for number, inner in enumerate(schema):
            yield from objects(inner, f"{path}/{number}")


def test_the_table_in_the_readme_is_current() -> None:
    assert README.read_text() == readme(), "run: .venv/bin/python -m tests.support.chart_values"


def test_every_value_has_a_description() -> None:
    assert [value.path for value in values() if not value.description] == []


def test_the_schema_refuses_unknown_properties() -> None:
    open_ones = [
        path for path, schema in objects(SCHEMA) if schema.get("additionalProperties") is not False
    ]
    assert open_ones == []


FROM_A_PARENT: Final = ("global", "enabled")
"""Values that Helm passes on if another chart has this one as a dependency."""
NEEDED: Final = ("", "image", "secret", "wholeSecret", "strategy", "destination", "server")


def test_a_section_that_is_null_is_refused() -> None:
    """Helm removes a value that is null, and the schema requires all of them."""
    optional = {
        path: missing
        for path, schema in objects(SCHEMA)
        if (path.startswith("/properties") and "/items" not in path)
        or path.rpartition("/")[2] in NEEDED
        if (missing := set(schema.get("properties", {})) - set(schema.get("required", [])))
    }
    assert optional == {"": set(FROM_A_PARENT)}


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

    affinity = [
        f"{component}.affinity.{kind}"
        for component in ("api", "consumer", "operator")
        for kind in ("nodeAffinity", "podAffinity", "podAntiAffinity")
    ]
    assert list(missing(SCHEMA, defaults())) == [*FROM_A_PARENT, *affinity]
