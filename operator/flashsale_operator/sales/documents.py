"""Read the documents of YAML and JSON texts as kubectl reads them, but more strictly.

YAML is written so that kubectl and `documents_of` read the same values. kubectl reads YAML 1.1 with
Go's number formats. A test compares both on the same scalars.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, Final

import yaml

MAX_FIELDS: Final = 1_000
_MERGE: Final = "tag:yaml.org,2002:merge"


class UnreadableText(Exception):
    """A text is neither YAML nor JSON, or it is ambiguous. The message is one line."""


def documents_of(text: str) -> list[Any]:
    """Returns the documents of a text. Raises `UnreadableText`.

    A text that begins with `{` is JSON if it can be read as such. Unlike YAML, JSON may be indented
    by tabs, and a JSON text can have several values.
    """
    text = text.removeprefix("\ufeff")
    try:
        if text.lstrip().startswith("{"):
            try:
                return list(_json(text))
            except json.JSONDecodeError as error:
                if "\t" in text:  # YAML would only complain about the tab
                    raise UnreadableText(f"not JSON: {error.msg} in line {error.lineno}") from None
        return list(yaml.load_all(text, _Loader))
    except yaml.YAMLError as error:
        raise UnreadableText(f"not YAML: {_one_line(error)}") from None
    except RecursionError:
        raise UnreadableText("not YAML: nested too deeply") from None


def yaml_of(document: object) -> str:
    """Returns a document as YAML."""
    text: str = yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text.rstrip("\n")


def _json(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder(
        object_pairs_hook=_mapping,
        parse_int=lambda digits: int(digits) if len(digits) < 40 else float(digits),
        parse_constant=_refuse_constant,
    )
    at, next_value = 0, re.compile(r"\S")
    while found := next_value.search(text, at):
        value, at = decoder.raw_decode(text, found.start())
        yield value


def _refuse_constant(name: str) -> None:
    raise UnreadableText(f"not JSON: {name} is not a number")


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise UnreadableText(f"not JSON: {shown(name)} appears twice")
        values[name] = value
    return values


def shown(key: object) -> str:
    """Returns any field name of a manifest as short ASCII text."""
    shown = key if isinstance(key, str) and re.match(r"^[\w./-]+\Z", key, re.ASCII) else ascii(key)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _one_line(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    where = f" in line {mark.line + 1}" if mark else ""
    return f"{error.problem or error.context}{where}"


class _Loader(yaml.SafeLoader):
    """A strict YAML loader for manifests.

    It refuses tags, duplicate keys, and merges of many fields, which could expand a few lines to
    gigabytes. Of YAML 1.1's implicit scalar types it knows those of JSON, in Go's formats.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's convention

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) not in (None, "!"):
            raise yaml.composer.ComposerError(None, None, "tags are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_FIELDS:
            raise yaml.constructor.ConstructorError(
                None, None, f"more than {MAX_FIELDS} merged fields", node.start_mark
            )

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key, mark in self._keys(node):
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{shown(key)} appears twice", mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def _keys(self, node: yaml.MappingNode) -> Iterator[tuple[object, yaml.Mark]]:
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a field name must be text", key_node.start_mark
                )
            if key_node.tag != _MERGE:
                key_node.tag = "tag:yaml.org,2002:str"
                yield key_node.value, key_node.start_mark


class _Dumper(yaml.SafeDumper):
    """Also quotes a text that only kubectl would read as a number or a boolean: 5e10, 0o17, y."""


_BOOLEANS: Final = {
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "off", "Off", "OFF"), False),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGERS: Final = (
    (r"[-+]?0x[0-9a-f]+", 16),
    (r"[-+]?0b[01]+", 2),
    (r"[-+]?0o?[0-7]+", 8),
    (r"[-+]?(?:0|[1-9][0-9]*)", 10),
)

_GO_INTEGER: Final = "0[xX][0-9a-fA-F_]+|0[bB][01_]+|0[oO][0-7_]+"
_GO_FLOAT: Final = r"(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9_]+)(?:[eE][-+]?[0-9_]+)?"


def _number(text: str) -> int | float | str:
    """Returns a number in one of Go's formats, such as 1_000, 0x64, 0100 (which is 64) or 1e+06."""
    digits = text.replace("_", "").lower()
    for pattern, base in _INTEGERS:
        if re.fullmatch(pattern, digits):
            return int(digits, base)
    try:
        return float(digits)
    except ValueError:
        return text


_Loader.add_constructor("tag:yaml.org,2002:bool", lambda _, node: _BOOLEANS[node.value])
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: _number(node.value))
# A number with more digits than any field allows stays text, because to parse it can take seconds.
for _tag, _pattern, _first in (
    ("bool", rf"^(?:{'|'.join(_BOOLEANS)})\Z", "yYnNoOtTfF"),
    (
        "float",
        rf"^(?=.{{1,40}}\Z)[-+]?(?:{_GO_INTEGER}|{_GO_FLOAT})\Z",
        "-+.0123456789",
    ),
    ("merge", r"^<<\Z", "<"),
    ("null", r"^(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(_pattern, re.ASCII), list(_first)
        )
