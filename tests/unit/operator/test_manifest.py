"""FlashSale manifests: parsed values, and messages about mistakes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flashsale.sale import SaleSpec
from flashsale_operator.ctl import files
from flashsale_operator.sales.documents import documents_of
from flashsale_operator.sales.manifest import ManifestError, check_item, parse, sale_spec
from tests.support.bad_manifests import ABSENT, BAD_MANIFESTS, NAME, STARTS, STOCK, Bad, manifest
from tests.support.go_scalars import GO_SCALARS

OPTIONAL = ("maxPerUser", "paused", "holdSeconds", "maxExpiredHolds")
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)
)
SMALL = (
    '{"apiVersion":"flashsale.dev/v1alpha1","kind":"FlashSale","metadata":{"name":"a%d"},'
    '"spec":{"itemId":"a","stock":1}}\n'
)
TOO_DEEP = ("not YAML: nested too deeply",)
HEAD = "apiVersion: flashsale.dev/v1alpha1\nkind: FlashSale\nmetadata: {name: a}\n"


def mistakes(text: str) -> tuple[str, ...]:
    with pytest.raises(ManifestError) as refused:
        parse(text)
    return refused.value.mistakes


def parse_or_mistake(text: str) -> list[SaleSpec] | tuple[str, ...]:
    try:
        return parse(text)
    except ManifestError as error:
        return error.mistakes


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
  holdSeconds: 600
  maxExpiredHolds: 2
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
            hold_seconds=600,
            max_expired_holds=2,
        )
    ]


def test_absent_and_null_fields_get_defaults() -> None:
    assert sale_spec(manifest()) == SaleSpec("default/iphone-15", "iphone_15", 100)
    nulls = Bad((), dict.fromkeys(OPTIONAL), {"namespace": None})
    assert sale_spec(manifest(nulls)) == SaleSpec("default/iphone-15", "iphone_15", 100)


@pytest.mark.parametrize(
    "metadata",
    [
        {"generateName": "iphone-"},
        {"generateName": "iphone-", "uid": "00000000-0000-0000-0000-000000000001"},
        {"fieldOfALaterKubernetes": {}, "uid": "00000000-0000-0000-0000-000000000001"},
    ],
)
def test_an_object_of_the_kube_apiserver_is_a_sale(metadata: dict[str, Any]) -> None:
    given = manifest(Bad((), metadata=metadata))
    assert sale_spec(given) == sale_spec(manifest())
    assert parse(json.dumps(given)) == [sale_spec(manifest())]


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_every_mistake_names_its_field_and_rule(case: str) -> None:
    bad = BAD_MANIFESTS[case]
    with pytest.raises(ManifestError) as refused:
        sale_spec(manifest(bad))
    assert refused.value.mistakes == bad.mistakes
    if not any(isinstance(value, float | int) for value in bad.spec.values()):
        assert mistakes(yaml.safe_dump(manifest(bad))) == bad.mistakes
    assert mistakes(json.dumps(manifest(bad))) == bad.mistakes


@pytest.mark.parametrize("text", [each for each in GO_SCALARS if each])
def test_scalars_mean_the_same_as_to_kubectl(text: str) -> None:
    [document] = documents_of(f"x: {text}\n")
    expected = GO_SCALARS[text]
    assert (document["x"], type(document["x"])) == (expected, type(expected))


@pytest.mark.parametrize(
    ("text", "stock"),
    [("1e+06", 1_000_000), ("100.0", 100), ("1_000", 1_000), ("0x64", 100), ("+5", 5)],
)
def test_a_stock_in_any_format_of_kubectl_is_read(text: str, stock: int) -> None:
    [spec] = parse(with_stock(text))
    assert (spec.stock, type(spec.stock)) == (stock, int)


@pytest.mark.parametrize("number", ["1e+06", "100.0", "1E2"])
def test_a_whole_number_of_json_is_an_integer(number: str) -> None:
    [spec] = parse(json.dumps(manifest()).replace('"stock": 100', f'"stock": {number}'))
    assert (spec.stock, type(spec.stock)) == (float(number), int)


@pytest.mark.parametrize("word", ["yes", "On", "TRUE", "y"])
def test_a_boolean_in_any_word_of_kubectl_is_read(word: str) -> None:
    [spec] = parse(f"{HEAD}spec: {{itemId: a, stock: 1, paused: {word}}}\n")
    assert spec.paused is True


@pytest.mark.parametrize(
    "text",
    ["1:30", "'5'", "yes", "9" * 5000, ".inf", "1.5", "1e400", "1e-2", "~", "_1", "0b", "0x"],
)
def test_a_stock_that_is_no_integer_is_refused(text: str) -> None:
    assert mistakes(with_stock(text)) == (STOCK,)


def test_an_alias_and_a_merge_mean_the_same_as_to_kubectl() -> None:
    text = f"{HEAD}spec:\n  <<: &all {{itemId: a, stock: 1, paused: yes}}\n  stock: 5\n---\n"
    shared = f"{HEAD.replace('{name: a}', '&name {name: a, namespace: shop}')}spec: *all\n"
    [spec] = parse(text)
    assert (spec.stock, spec.paused) == (5, True)
    [mistake] = mistakes(shared)
    assert mistake.startswith("not YAML: found undefined alias 'all'")


def test_aliases_of_aliases_take_no_memory() -> None:
    levels = "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}1]\n" for n in range(1, 60))
    assert "a59: unknown field" in mistakes(f"a0: &a0 [1]\n{levels}")


def exported(*names: str, kind: str = "List") -> dict[str, Any]:
    """Return the output of `kubectl get -o json`."""
    items = [manifest(Bad((), metadata={"name": name})) for name in names]
    return {"apiVersion": "v1", "kind": kind, "items": items, "metadata": {"resourceVersion": ""}}


@pytest.mark.parametrize("kind", ["List", "FlashSaleList"])
def test_the_items_of_a_list_are_sales(kind: str) -> None:
    for text in (
        yaml.safe_dump(exported("a", "b", kind=kind)),
        json.dumps(exported("a", "b", kind=kind), indent="\t"),
    ):
        assert [spec.sale_id for spec in parse(text)] == ["default/a", "default/b"]
    assert parse(json.dumps(exported(kind=kind))) == []


def test_lists_in_lists_are_read() -> None:
    listed = exported("a") | {"items": [exported("b", "c"), exported(), *exported("d")["items"]]}
    assert [spec.sale_id for spec in parse(json.dumps(listed))] == [
        f"default/{name}" for name in "bcd"
    ]
    listed["items"][0] = exported("b", "B")
    assert mistakes(json.dumps(listed)) == (f"item 1: item 2: {NAME}",)
    for depth in (*range(100, 1_000, 20), 20_000):
        deep = '{"kind":"List","items":[' * depth + "]}" * depth
        assert parse_or_mistake(deep) in ([], ("nested too deeply",), TOO_DEEP)


@pytest.mark.parametrize("leaf", ["[]", "[{a: 1}, {a: 1}]"])
def test_anchors_cannot_make_a_few_lines_to_billions_of_items(leaf: str) -> None:
    lines = [f"- &l0 {{kind: List, items: {leaf}}}"]
    lines += [f"- &l{n} {{kind: List, items: [*l{n - 1}, *l{n - 1}]}}" for n in range(1, 30)]
    text = "\n".join(["kind: List", "items:", *lines])
    assert mistakes(text) == ("contains more than 100000 items",)


def test_a_mistake_in_a_list_names_its_item() -> None:
    listed = exported("a", "a", "B")
    assert mistakes(json.dumps(listed)) == (
        "item 2: metadata.name: default/a appears twice",
        f"item 3: {NAME}",
    )


def test_a_list_without_a_list_of_items_is_a_mistake() -> None:
    assert mistakes(json.dumps(exported("a") | {"items": 5})) == ("items: must be a list",)
    assert parse(json.dumps(exported("a") | {"items": None})) == []


@pytest.mark.parametrize("name", ["2027", "7.5", "yes", "0x10"])
def test_a_name_that_yaml_reads_as_no_text_needs_quotes(name: str) -> None:
    given = f"{HEAD}spec: {{itemId: %s, stock: 1}}\n"
    assert mistakes(given % name) == ("spec.itemId: must be text, so put it in quotes",)
    assert parse(given % f"'{name}'")[0].item_id == name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (json.dumps(dict.fromkeys(range(500_000)))[:-1] + ',"x":0,"x":0}', "x appears twice"),
        ("".join(SMALL % n for n in (*range(60_000), 0)), "default/a0 appears twice"),
    ],
    ids=["fields", "sales"],
)
def test_names_in_a_large_file_are_compared_in_one_pass(
    text: str, says: str, tmp_path: Path
) -> None:
    """A search of all earlier names for each name would take minutes."""
    file = tmp_path / "sales.json"
    file.write_text(text)
    assert file.stat().st_size <= files.MAX_BYTES
    done = subprocess.run(
        [Path(sys.executable).with_name("flashsalectl"), "apply", "-f", file],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert says in done.stderr


def test_json_may_have_tabs_and_several_values() -> None:
    one, two = (manifest(Bad((), metadata={"name": name})) for name in "ab")
    text = "\ufeff" + json.dumps(one, indent="\t") + "\n" + json.dumps(two)
    assert [spec.sale_id for spec in parse(text)] == ["default/a", "default/b"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1,\n\t"b" 2}', "not JSON: Expecting ':' delimiter in line 2"),
        ('{"a": 1, "a": 2}', "not JSON: a appears twice"),
        ('{"a": NaN}', "not JSON: NaN is not a number"),
        ('{"a":' * 100_000, "not YAML: nested too deeply"),
    ],
)
def test_json_that_is_no_manifest_gives_a_message_of_one_line(text: str, says: str) -> None:
    [mistake] = mistakes(text)
    assert mistake.startswith(says)
    assert "\n" not in mistake


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
        ("a: 1\na: 2\n", "not YAML: a appears twice in line 2"),
        ("b: *x\n", "not YAML: found undefined alias 'x' in line 1"),
        (MERGES, "not YAML: more than 1000 merged fields in line"),
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


PREFIXES = {"shop": "shop-", "outlet": "shop-outlet-", "yard": "yard.", "barn": "yard."}


@pytest.mark.parametrize(
    ("namespace", "item"),
    [
        ("shop", "shop-1"),
        ("shop", "shop-outlet"),
        ("outlet", "shop-outlet-1"),
        ("yard", "yard.1"),
        ("barn", "yard.1"),
        ("other", "shop"),
        ("other", "cup"),
    ],
)
def test_a_namespace_sells_the_items_of_its_longest_prefix(namespace: str, item: str) -> None:
    check_item(SaleSpec(f"{namespace}/cup", item, 1), PREFIXES)


@pytest.mark.parametrize(
    ("namespace", "item", "rule"),
    [
        ("shop", "cup", "must begin with shop- in the namespace shop"),
        ("outlet", "shop-1", "must begin with shop-outlet- in the namespace outlet"),
        (
            "shop",
            "shop-outlet-1",
            "must not begin with shop-outlet-, which is for the namespace outlet",
        ),
        (
            "other",
            "yard.1",
            "must not begin with yard., which is for the namespace barn and yard",
        ),
    ],
)
def test_an_item_of_another_namespace_is_a_mistake_that_names_the_rule(
    namespace: str, item: str, rule: str
) -> None:
    with pytest.raises(ManifestError) as caught:
        check_item(SaleSpec(f"{namespace}/cup", item, 1), PREFIXES)
    assert str(caught.value) == f"spec.itemId: {rule} (operator.items)"


def test_without_prefixes_every_namespace_sells_every_item() -> None:
    check_item(SaleSpec("other/cup", "shop-1", 1), {})
