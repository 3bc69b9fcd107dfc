"""FlashSale manifests: parsed values, and messages about mistakes."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flashsale.sale import SaleSpec
from flashsale_operator.sales.manifest import ManifestError, parse, sale_spec
from tests.support.bad_manifests import ABSENT, BAD_MANIFESTS, STARTS, STOCK, Bad, manifest

HEAD = "apiVersion: flashsale.dev/v1alpha1\nkind: FlashSale\nmetadata: {name: a}\n"


def mistakes(text: str) -> tuple[str, ...]:
    with pytest.raises(ManifestError) as refused:
        parse(text)
    return refused.value.mistakes


def with_stock(text: str) -> str:
    return f"{HEAD}spec: {{itemId: a, stock: {text}}}\n"


def test_a_manifest_becomes_a_sale() -> None:
    text = """
apiVersion: flashsale.dev/v1alpha1
kind: FlashSale
metadata:
  name: iphone-15
  namespace: shop
  labels: {team: phones}
spec:
  itemId: iphone_15
  displayName: iPhone 15, blå
  stock: 100
  maxPerUser: 2
  startsAt: 2026-11-27T09:00:00Z
  endsAt: "2026-11-27T11:00:00.5+01:00"
  paused: true
status: {saleId: shop/iphone-15}
"""
    assert parse(text) == [
        SaleSpec(
            sale_id="shop/iphone-15",
            item_id="iphone_15",
            stock=100,
            max_per_user=2,
            display_name="iPhone 15, blå",
            starts_ms=1_795_770_000_000,
            ends_ms=1_795_773_600_500,
            paused=True,
        )
    ]


def test_absent_and_null_fields_get_defaults() -> None:
    assert sale_spec(manifest()) == SaleSpec("default/iphone-15", "iphone_15", 100)
    nulls = Bad((), {"maxPerUser": None, "paused": None}, {"namespace": None})
    assert sale_spec(manifest(nulls)) == SaleSpec("default/iphone-15", "iphone_15", 100)


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_every_mistake_names_its_field_and_rule(case: str) -> None:
    bad = BAD_MANIFESTS[case]
    with pytest.raises(ManifestError) as refused:
        sale_spec(manifest(bad))
    assert refused.value.mistakes == bad.mistakes
    if not any(isinstance(value, float | int) for value in bad.spec.values()):
        assert mistakes(yaml.safe_dump(manifest(bad))) == bad.mistakes
    assert mistakes(json.dumps(manifest(bad))) == bad.mistakes


@pytest.mark.parametrize(
    "text",
    [
        "100.0",
        "1e2",
        "1_000",
        "0o17",
        "017",
        "0x10",
        "+5",
        "1:30",
        "'5'",
        "yes",
        "9" * 5000,
        ".inf",
    ],
)
def test_yaml_reads_only_plain_decimal_numbers_as_integers(text: str) -> None:
    assert mistakes(with_stock(text)) == (STOCK,)


def test_a_time_in_yaml_s_own_format_is_refused() -> None:
    assert mistakes(f"{HEAD}spec: {{itemId: a, stock: 1, startsAt: 2026-11-27 09:00:00}}\n") == (
        STARTS,
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "contains no FlashSale"),
        ("# only a comment\n---\n", "contains no FlashSale"),
        ("- a\n", "must be a mapping: a FlashSale"),
        ("just text", "must be a mapping: a FlashSale"),
        ("a: [1", "not YAML: expected ',' or ']', but got '<stream end>' in line 1"),
        ("a: 1\na: 2\n", "not YAML: a appears twice in line 1"),
        ("a: &x [1]\nb: *x\n", "not YAML: aliases are not allowed in line 2"),
        ("a: !!python/object:os.system x\n", "not YAML: tags are not allowed in line 1"),
        ("a: !!int 0x1z\n", "not YAML: tags are not allowed in line 1"),
        ("? [a]\n: b\n", "not YAML: a field name must be text in line 1"),
        ("a: \x00", "not YAML: unacceptable character #x0000: special characters are not allowed"),
        ("[" * 100_000, "not YAML: nested too deeply"),
    ],
)
def test_text_that_is_no_manifest_gives_a_message_of_one_line(text: str, says: str) -> None:
    [mistake] = mistakes(text)
    assert mistake.startswith(says)
    assert "\n" not in mistake


def test_a_message_about_any_field_name_is_short_and_printable() -> None:
    text = f'{HEAD}spec: {{itemId: a, stock: 1, "\\ud800\\n": 1, {"x" * 500}: 1, 7: 1, on: 1}}\n'
    found = mistakes(text)
    assert all(
        len(mistake) < 100 and mistake.isascii() and "\n" not in mistake for mistake in found
    )
    assert found[-2:] == ("spec.7: unknown field", "spec.on: unknown field")


def test_each_document_is_a_sale_and_mistakes_name_their_document() -> None:
    good, bad = json.dumps(manifest()), json.dumps(manifest(Bad((), {"stock": ABSENT})))
    other = json.dumps(manifest(Bad((), metadata={"name": "b"})))
    assert [spec.sale_id for spec in parse(f"---\n{good}\n---\n{other}\n---\n")] == [
        "default/iphone-15",
        "default/b",
    ]
    assert mistakes(f"{good}\n---\n{bad}\n---\n{good}\n") == (
        "document 2: spec.stock: is required",
        "document 3: metadata.name: default/iphone-15 appears twice",
    )


# Characters with a meaning in YAML, and a few others. All of Unicode takes seconds to set up.
CHARACTERS = "aZ09_.~-:{}[],&*!|>'\"%@`#?<= \n\t\x00\x7fé\ud800"
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(CHARACTERS),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=3,
)
FIELDS = ("itemId", "stock", "maxPerUser", "startsAt", "endsAt", "displayName")


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, json_values)))
def test_any_spec_gives_a_sale_or_mistakes(spec: dict[str, object]) -> None:
    try:
        sale = sale_spec(manifest() | {"spec": spec})
    except ManifestError:
        return
    assert type(sale.stock) is int
    assert sale.item_id == spec["itemId"]


@given(st.text(CHARACTERS))
def test_any_text_is_refused_with_mistakes_and_no_crash(text: str) -> None:
    with pytest.raises(ManifestError):
        parse(text)
