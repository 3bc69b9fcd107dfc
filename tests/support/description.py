"""OpenAPI documents of the API, and the comparison of one with real answers."""

import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import httpx
from jsonschema_rs import Draft202012Validator

URN = "urn:flashsale:problem:"

Sort = tuple[str, int, str]
"""A sort of answer: the operation, the status, and the slug of the problem or ""."""


class Description:
    """A document, by the name of its file."""

    def __init__(self, name: str) -> None:
        self.document: dict[str, Any] = json.loads((files("flashsale_api") / name).read_bytes())

    def resolved(self, value: Any) -> Any:  # noqa: ANN401 - any part of a JSON document
        """Follow the references of a part of the document."""
        while isinstance(value, dict) and "$ref" in value:
            found: Any = self.document
            for name in value["$ref"].removeprefix("#/").split("/"):
                found = found[name]
            value = found
        return value

    def slugs(self, schema: Any) -> Iterator[str]:  # noqa: ANN401 - any part of a JSON document
        """Yield the slugs of the problems that a schema allows."""
        match self.resolved(schema):
            case {"properties": {"type": {"const": str(urn)}}}:
                yield urn.removeprefix(URN)
            case {"properties": {"type": {"enum": list(urns)}}}:
                yield from (urn.removeprefix(URN) for urn in urns)
            case {"allOf": list(parts)} | {"oneOf": list(parts)}:
                for part in parts:
                    yield from self.slugs(part)

    def described(self) -> set[Sort]:
        """Return every described sort of answer."""
        found = set()
        for path, methods in self.document["paths"].items():
            for method, operation in methods.items():
                if method == "parameters":
                    continue
                for status, response in operation["responses"].items():
                    for content in (
                        self.resolved(response).get("content", {}).values()
                    ):  # 304 has none
                        for slug in list(self.slugs(content["schema"])) or [""]:
                            found.add((f"{method.upper()} {path}", int(status), slug))
        return found


class Seen:
    """The sorts of real answers. Each answer is checked against the document."""

    def __init__(self, description: Description) -> None:
        self.description = description
        self.sorts: set[Sort] = set()

    def check(self, label: str, answer: httpx.Response) -> str:
        """Assert that the answer is as described. Return the slug of the problem, or ""."""
        method, path = label.split(" ")
        document, resolved = self.description.document, self.description.resolved
        operation = document["paths"][path][method.lower()]
        assert str(answer.status_code) in operation["responses"], (label, answer.text)
        response = resolved(operation["responses"][str(answer.status_code)])
        kind = answer.headers["content-type"].partition(";")[0]
        schema = {**response["content"][kind]["schema"], "components": document["components"]}
        slug = ""
        if kind.startswith("text/"):
            Draft202012Validator(schema).validate(answer.text)
        else:
            Draft202012Validator(schema, validate_formats=True).validate(answer.json())
        if kind == "application/problem+json":
            slug = answer.json()["type"].removeprefix(URN)
        for name, header in response.get("headers", {}).items():
            if (value := answer.headers.get(name)) is not None:
                rule = resolved(header)["schema"]
                number = rule.get("type") == "integer"
                Draft202012Validator(rule).validate(int(value) if number else value)
        self.sorts.add((label, answer.status_code, slug))
        return slug
