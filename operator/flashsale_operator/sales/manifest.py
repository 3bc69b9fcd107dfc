"""Parse FlashSale manifests: from YAML or JSON to `SaleSpec`, or to a list of all mistakes.

The rules are a table. The CRD has the same rules, and a test compares the two.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from typing import Any, Final, NamedTuple, cast

from flashsale.errors import FlashsaleError
from flashsale.fields import (
    ITEM_ID_PATTERN,
    MAX_DISPLAY_NAME,
    MAX_EXPIRED_HOLDS,
    MAX_HOLD_SECONDS,
    MAX_PER_USER,
    MAX_STOCK,
)
from flashsale.sale import SaleSpec, ms_of_time
from flashsale_operator.sales.documents import UnreadableText, documents_of, shown

GROUP: Final = "flashsale.dev"
"""The API group. docs/adr/0008-the-api-group.md tells why it has only this one constant."""
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "FlashSale"
LISTS: Final = ("List", f"{KIND}List")
PLURAL: Final = "flashsales"
DEFAULT_NAMESPACE: Final = "default"
MAX_ITEMS: Final = 100_000
"""Of a file, also if the items are Lists. A file of the largest size has fewer FlashSales."""

_PART: Final = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
# As in the kube-apiserver, only the whole name has a limit. DNS also limits each part of it.
NAME_PATTERN: Final = rf"^(?=.{{1,253}}\Z){_PART}(\.{_PART})*\Z"
NAMESPACE_PATTERN: Final = rf"^(?=.{{1,63}}\Z){_PART}\Z"
DISPLAY_NAME_PATTERN: Final = rf"^[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{{1,{MAX_DISPLAY_NAME}}}\Z"
# Years from 2000 to 2999: with any offset, such a time stays in the range of a datetime.
# The kube-apiserver refuses the hour 24, but Python 3.14 reads it.
TIME_PATTERN: Final = r"^2\d{3}-\d\d-\d\dT(?!24)\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)\Z"


class ManifestError(FlashsaleError):
    """A manifest is wrong. Each line of `mistakes` names a field and its rule."""

    def __init__(self, mistakes: list[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = tuple(mistakes)


class Rule(NamedTuple):
    """A rule in words, and the check that a value follows it."""

    must: str
    holds: Callable[[object], bool]


@dataclass(frozen=True, slots=True)
class Field:
    """A field and its rule. As in a CRD, a null field counts as absent."""

    name: str
    rule: Rule
    required: bool = False
    default: object = None


def _integer(low: int, high: int) -> Rule:
    return Rule(
        f"must be an integer from {low} to {high}",
        lambda value: type(value) is int and low <= value <= high,
    )


def _text(must: str, pattern: str) -> Rule:
    return Rule(must, lambda value: isinstance(value, str) and re.match(pattern, value) is not None)


def _exactly(wanted: str) -> Rule:
    return Rule(f"must be {wanted}", lambda value: value == wanted)


def _is_time(value: object) -> bool:
    if not isinstance(value, str) or not re.match(TIME_PATTERN, value, re.ASCII):
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


MAPPING: Final = Rule("must be a mapping", lambda value: isinstance(value, dict))
BOOLEAN: Final = Rule("must be true or false", lambda value: isinstance(value, bool))
TIME: Final = Rule(
    "must be an RFC 3339 time with an offset in the years 2000 to 2999, such as "
    "2026-11-27T09:00:00Z",
    _is_time,
)
TOP_FIELDS: Final = (
    Field("apiVersion", _exactly(API_VERSION), required=True),
    Field("kind", _exactly(KIND), required=True),
    Field("metadata", MAPPING, required=True),
    Field("spec", MAPPING, required=True),
)
METADATA_FIELDS: Final = (
    Field(
        "metadata.name",
        _text(
            "must be a DNS-1123 name: at most 253 characters, lower-case letters, digits, - and .",
            NAME_PATTERN,
        ),
        required=True,
    ),
    Field(
        "metadata.namespace",
        _text(
            "must be a DNS-1123 label: at most 63 characters, lower-case letters, digits and -",
            NAMESPACE_PATTERN,
        ),
        default=DEFAULT_NAMESPACE,
    ),
)
SPEC_FIELDS: Final = (
    Field(
        "spec.itemId",
        _text(
            "must be 1 to 128 of the characters A-Z a-z 0-9 . _ ~ - and begin with a letter or "
            "a digit",
            ITEM_ID_PATTERN,
        ),
        required=True,
    ),
    Field(
        "spec.displayName",
        _text(
            f"must be 1 to {MAX_DISPLAY_NAME} characters, none of them a control character",
            DISPLAY_NAME_PATTERN,
        ),
    ),
    Field("spec.stock", _integer(0, MAX_STOCK), required=True),
    Field("spec.maxPerUser", _integer(1, MAX_PER_USER), default=1),
    Field("spec.startsAt", TIME),
    Field("spec.endsAt", TIME),
    Field("spec.paused", BOOLEAN, default=False),
    Field("spec.holdSeconds", _integer(1, MAX_HOLD_SECONDS)),
    Field("spec.maxExpiredHolds", _integer(1, MAX_EXPIRED_HOLDS), default=3),
)
# Fields that the kube-apiserver or kubectl adds to an object. They do not describe the sale.
IGNORED_TOP: Final = frozenset({"status"})
IGNORED_METADATA: Final = frozenset(
    {
        "annotations", "creationTimestamp", "deletionGracePeriodSeconds", "deletionTimestamp",
        "finalizers", "generateName", "generation", "labels", "managedFields", "ownerReferences",
        "resourceVersion", "selfLink", "uid",
    }
)  # fmt: skip


def parse(text: str) -> list[SaleSpec]:
    """Returns the sales of a YAML or JSON text: one per document, or per item of a List.

    Empty documents are skipped. Raises `ManifestError` with all mistakes. If there are several
    documents or items, each mistake names its own.
    """
    try:
        documents = [document for document in documents_of(text) if document is not None]
    except UnreadableText as error:
        raise ManifestError([str(error)]) from None
    if not documents:
        raise ManifestError(["contains no FlashSale"])
    specs: dict[str, SaleSpec] = {}
    mistakes: list[str] = []
    counter = count(1)
    for number, document in enumerate(documents, 1):
        where = f"document {number}: " if len(documents) > 1 else ""
        try:
            items = _items(document, counter)
        except RecursionError:
            raise ManifestError([f"{where}nested too deeply"]) from None
        for place, item in items:
            try:
                spec = sale_spec(item)
            except ManifestError as error:
                mistakes += [where + place + mistake for mistake in error.mistakes]
                continue
            if spec.sale_id in specs:
                mistakes.append(f"{where}{place}metadata.name: {spec.sale_id} appears twice")
            specs[spec.sale_id] = spec
    if mistakes:
        raise ManifestError(mistakes)
    return list(specs.values())


def _items(document: object, counter: Iterator[int]) -> list[tuple[str, object]]:
    """Returns a document, or the items of a List and its Lists, each with its place in messages.

    The counter counts all of them. YAML's anchors could make a few lines to billions of items.
    """
    if next(counter) > MAX_ITEMS:
        raise ManifestError([f"contains more than {MAX_ITEMS} items"])
    if isinstance(document, dict) and document.get("kind") in LISTS:
        items = document.get("items")
        if items is None or isinstance(items, list):
            return [
                (f"item {number}: {place}", found)
                for number, item in enumerate(items or (), 1)
                for place, found in _items(item, counter)
            ]
    return [("", document)]


def sale_spec(document: object) -> SaleSpec:
    """Returns the sale of one parsed manifest. Raises `ManifestError`.

    The metadata of an object of the kube-apiserver can have fields of a later Kubernetes. Such an
    object has a uid.
    """
    if not isinstance(document, dict):
        raise ManifestError(["must be a mapping: a FlashSale"])
    if document.get("kind") in LISTS:
        raise ManifestError(["items: must be a list"])
    mistakes: list[str] = []
    top = _read("", document, TOP_FIELDS, IGNORED_TOP, mistakes)
    given = top.get("metadata", {})
    ignored_metadata = frozenset(given) if "uid" in given else IGNORED_METADATA
    metadata, spec = (
        _read(part, cast("dict[object, object]", top[part]), fields, ignored, mistakes)
        if part in top
        else {}
        for part, fields, ignored in (
            ("metadata", METADATA_FIELDS, ignored_metadata),
            ("spec", SPEC_FIELDS, frozenset[str]()),
        )
    )
    starts_ms, ends_ms = (
        None if name not in spec else _ms(cast("str", spec[name]))
        for name in ("startsAt", "endsAt")
    )
    if starts_ms is not None and ends_ms is not None and ends_ms <= starts_ms:
        mistakes.append("spec.endsAt: must be after spec.startsAt")
    if mistakes:
        raise ManifestError(mistakes)
    return SaleSpec(
        sale_id=f"{metadata['namespace']}/{metadata['name']}",
        item_id=spec["itemId"],
        stock=spec["stock"],
        max_per_user=spec["maxPerUser"],
        display_name=spec.get("displayName"),
        starts_ms=starts_ms,
        ends_ms=ends_ms,
        paused=spec["paused"],
        hold_seconds=spec.get("holdSeconds"),
        max_expired_holds=spec["maxExpiredHolds"],
    )


def check_item(spec: SaleSpec, prefixes: Mapping[str, str]) -> None:
    """Raises `ManifestError` if the sale's namespace may not sell its item.

    `prefixes` has the prefix of the items that a namespace may sell, by namespace. The longest
    prefix of an item decides. A namespace without a prefix may sell the items that have none.
    """
    namespace = spec.sale_id.partition("/")[0]
    own = prefixes.get(namespace, "")
    found = max(
        (prefix for prefix in prefixes.values() if spec.item_id.startswith(prefix)),
        key=len,
        default="",
    )
    if own == found:
        return
    if not spec.item_id.startswith(own):
        mistake = f"must begin with {own} in the namespace {namespace}"
    else:
        owners = sorted(name for name, prefix in prefixes.items() if prefix == found)
        mistake = f"must not begin with {found}, which is for the namespace {' and '.join(owners)}"
    raise ManifestError([f"spec.itemId: {mistake} (operator.items)"])


def _read(
    part: str,
    given: Mapping[object, object],
    fields: tuple[Field, ...],
    ignored: frozenset[str],
    mistakes: list[str],
) -> dict[str, Any]:
    """Returns the valid values by the last part of the field's name, and adds to `mistakes`."""
    values: dict[str, Any] = {}
    known = {field.name.rpartition(".")[2]: field for field in fields}
    mistakes += [
        f"{part}{'.' if part else ''}{shown(key)}: unknown field"
        for key in given
        if key not in known and key not in ignored
    ]
    for key, field in known.items():
        value = given.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # as the kube-apiserver reads 1e+06
        if key not in given or (value is None and not field.required):
            if field.required:
                mistakes.append(f"{field.name}: is required")
            elif field.default is not None:
                values[key] = field.default
        elif field.rule.holds(value):
            values[key] = value
        else:
            # YAML reads a name such as 2027 or yes as a number or a boolean.
            only_quotes = isinstance(value, int | float) and field.rule.holds(str(value))
            must = "must be text, so put it in quotes" if only_quotes else field.rule.must
            mistakes.append(f"{field.name}: {must}")
    return values


def _ms(time: str) -> int:
    return ms_of_time(datetime.fromisoformat(time))
