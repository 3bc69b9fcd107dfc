"""Random values: the chart refuses them in words, or a real kube-apiserver accepts every object.

The schema of the values generates them. Only structures whose fields depend on each other, such as
a toleration's, have a generator here.
"""

import json
import re
from collections.abc import Callable
from typing import Any, Final

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dev.cluster.control_plane import ControlPlane
from tests.support.chart import ADDRESSES, COMPONENTS, Helm, Refused, at, merged
from tests.support.chart_values import values
from tests.support.paths import CHART

pytestmark = pytest.mark.slow

EXAMPLES: Final = 40
SCHEMA: Final[dict[str, Any]] = json.loads((CHART / "values.schema.json").read_text())
FORMS: Final[dict[str, Any]] = yaml.safe_load((CHART / "files/addresses.yaml").read_text())
TEXT: Final = st.characters(codec="ascii", exclude_categories=["Cc"])
# YAML reads some of these as a number, a boolean, null or a date unless they are quoted.
ODD: Final = ("1e3", "0x1f", "007", "10", "1.5", "true", "no", "null", "2026-11-27", "y", "1-1")


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").removeprefix("#/$defs/")
    found: dict[str, Any] = SCHEMA["$defs"][name] if name else schema
    return found


def texts(schema: dict[str, Any]) -> st.SearchStrategy[str]:
    if "pattern" not in schema:
        return st.text(TEXT, max_size=20)
    longest = schema.get("maxLength", 1000)
    found = st.from_regex(schema["pattern"], fullmatch=True, alphabet=TEXT)
    # Odd texts that the pattern allows are as likely as all others.
    fits = st.sampled_from(ODD).filter(lambda text: _matches(schema["pattern"], text))
    allowed = any(_matches(schema["pattern"], text) for text in ODD)
    return (found | fits if allowed else found).filter(lambda text: len(text) <= longest)


def _matches(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text) is not None


def mappings(schema: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings with names that match patterns, such as labels."""
    ((pattern, value),) = schema["patternProperties"].items()
    return st.dictionaries(texts({"pattern": pattern}), of_schema(value), max_size=3)


def of_schema(given: dict[str, Any]) -> st.SearchStrategy[Any]:  # noqa: PLR0911 - one per kind
    """Return a strategy for the part of JSON schema that values use."""
    schema = resolved(given)
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    if "anyOf" in schema:
        return st.one_of([of_schema(each) for each in schema["anyOf"]])
    match schema["type"]:
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(schema["minimum"], schema["maximum"])
        case "number":
            return st.floats(schema["minimum"], schema["maximum"])
        case "string":
            return texts(schema)
        case "array":
            return st.lists(of_schema(schema["items"]), max_size=2, unique_by=json.dumps)
        case _:
            return mappings(schema)


LABELS: Final = of_schema({"$ref": "#/$defs/labels"})
NAMES: Final = of_schema({"$ref": "#/$defs/objectName"})
CIDRS: Final = st.ip_addresses(v=4).map(lambda address: f"{address}/32")
PEERS: Final = st.lists(
    st.fixed_dictionaries({"ipBlock": st.fixed_dictionaries({"cidr": CIDRS})})
    | st.fixed_dictionaries({"podSelector": st.fixed_dictionaries({"matchLabels": LABELS})}),
    max_size=2,
)
TOLERATIONS: Final = st.lists(
    st.fixed_dictionaries(
        {
            "key": st.sampled_from(["a", "1e3", "example.com/b"]),
            "operator": st.just("Equal"),
            "value": st.sampled_from(ODD),
            "effect": st.just("NoExecute"),
            "tolerationSeconds": st.integers(0, 10**9),
        }
    )
    | st.just({"operator": "Exists"}),
    max_size=2,
)
TERMS: Final = st.fixed_dictionaries(
    {
        "topologyKey": st.just("kubernetes.io/hostname"),
        "labelSelector": st.fixed_dictionaries({"matchLabels": LABELS}),
    }
)
AFFINITIES: Final = st.fixed_dictionaries(
    {},
    optional={
        "podAntiAffinity": st.fixed_dictionaries(
            {"requiredDuringSchedulingIgnoredDuringExecution": st.lists(TERMS, max_size=1)}
        ),
        "nodeAffinity": st.fixed_dictionaries(
            {
                "preferredDuringSchedulingIgnoredDuringExecution": st.lists(
                    st.fixed_dictionaries(
                        {
                            "weight": st.integers(1, 100),
                            "preference": st.fixed_dictionaries(
                                {
                                    "matchExpressions": st.just(
                                        [{"key": "a", "operator": "In", "values": ["1e3"]}]
                                    )
                                }
                            ),
                        }
                    ),
                    max_size=1,
                )
            }
        ),
    },
)
SPREADS: Final = st.lists(
    st.fixed_dictionaries(
        {
            "topologyKey": st.sampled_from(["rack", "example.com/row", "1e3"]),
            "maxSkew": st.integers(1, 1000),
            "whenUnsatisfiable": st.just("DoNotSchedule"),
        },
        optional={"minDomains": st.integers(1, 1000)},
    ),
    max_size=2,
    unique_by=lambda each: each["topologyKey"],
)
QUANTITIES: Final = st.fixed_dictionaries(
    {},
    optional={
        "cpu": st.integers(1, 10**7) | st.sampled_from(["1", "100m", "1e3", "0.5"]),
        "memory": st.integers(1, 10**12) | st.sampled_from(["1Gi", "512M", "1e9"]),
        "ephemeral-storage": st.integers(1, 10**12) | st.just("1Ti"),
    },
)
VARIABLES: Final = st.lists(
    st.fixed_dictionaries(
        {"name": texts({"pattern": "^X[A-Z0-9_]*$"}), "value": st.text(TEXT) | st.sampled_from(ODD)}
    )
    | st.fixed_dictionaries(
        {
            "name": texts({"pattern": "^Y[A-Z0-9_]*$"}),
            "valueFrom": st.fixed_dictionaries(
                {"secretKeyRef": st.fixed_dictionaries({"name": NAMES, "key": st.just("007")})}
            ),
        }
    ),
    max_size=2,
    unique_by=lambda each: str(each["name"]),
)
PARENTS: Final = st.lists(
    st.fixed_dictionaries(
        {"name": NAMES}, optional={"sectionName": NAMES, "port": st.integers(1, 65535)}
    ),
    max_size=1,
)
OWN: Final[dict[str, st.SearchStrategy[Any]]] = {
    "tolerations": TOLERATIONS,
    "affinity": AFFINITIES,
    "topologySpreadConstraints": SPREADS,
    "extraEnv": VARIABLES,
    "peers": PEERS,
    "buyers": PEERS,
    "prometheus": PEERS,
    "orders": PEERS,
    "loadBalancerSourceRanges": st.lists(CIDRS, max_size=2),
    "parentRefs": PARENTS,
    # Requests that are larger than the limits would be refused.
    "requests": st.just({}),
    "limits": QUANTITIES,
    "imagePullSecrets": st.lists(
        NAMES | st.fixed_dictionaries({"name": NAMES}), max_size=2, unique_by=str
    ),
}
FIXED: Final = (
    "crds.enabled",  # the CRD is large, and other tests apply it
    "operator.namespaces",  # other namespaces would have to exist
    "kafka.topics.namespace",
    *(f"{component}.priorityClassName" for component in COMPONENTS),  # must exist for a pod
)


def strategy(path: str) -> st.SearchStrategy[Any]:
    """Return a strategy for the value at a path."""
    schema, last = SCHEMA, path.rpartition(".")[2]
    if last in OWN:
        return OWN[last]
    for key in path.split("."):
        schema = resolved(schema)["properties"][key]
    if path in FORMS:
        return texts(FORMS[path])
    return of_schema(schema)


STRATEGIES: Final = {
    value.path: strategy(value.path) for value in values() if value.path not in FIXED
}


@st.composite
def random_values(draw: Callable[[st.SearchStrategy[Any]], Any]) -> dict[str, Any]:
    """Up to 15 random values that agree with each other in the most frequent respects."""
    paths = draw(st.lists(st.sampled_from(sorted(STRATEGIES)), max_size=15, unique=True))
    changed = merged(*(at(path, draw(STRATEGIES[path])) for path in paths))
    needed: list[dict[str, Any]] = [at("crds.enabled", False)]
    for server, field in (("redis", "url"), ("kafka", "bootstrap"), ("database", "url")):
        given = merged(ADDRESSES, changed)[server]
        if given.get("existingSecret", {}).get("name"):
            needed.append(at(f"{server}.{field}", ""))
        elif not given.get(field):
            needed.append(at(f"{server}.existingSecret.name", draw(NAMES)))
    for component in COMPONENTS:
        limits = changed.get(component, {}).get("resources", {}).get("limits")
        if limits is not None:
            needed.append(at(f"{component}.resources", {"limits": limits, "requests": limits}))
    users = changed.get("kafka", {}).get("users", {})
    if any(users.values()):
        needed.append(at("kafka.users", {each: users.get(each) or "u" for each in COMPONENTS}))
    topics = changed.get("kafka", {}).get("topics", {})
    if topics.get("enabled") and not topics.get("cluster"):
        needed.append(at("kafka.topics.cluster", "1e3"))
    return merged(ADDRESSES, changed, *needed)


def test_random_values_are_refused_in_words_or_give_valid_objects(
    chart: Helm, cluster: ControlPlane, namespace: str
) -> None:
    rendered = []
    strict = ("--validate=strict", "--warnings-as-errors")
    apply = ("apply", "--server-side", "--dry-run=server", *strict, "-n", namespace, "-f", "-")

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),  # each step of shrinking would take a second
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    @given(random_values())
    def check(values: dict[str, Any]) -> None:
        refusal = text = ""
        try:
            text = chart.run("template", "shop", str(CHART), "-n", namespace, values=values)
        except Refused as refused:
            refusal = str(refused)
        rendered.append(not refusal)
        if refusal:
            assert "Invalid values:" in refusal
            return
        done = cluster.kubectl(*apply, stdin=text)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("(server dry run)") == text.count("\nkind: ")

    check()
    # About half of them render, by chance.
    assert sum(rendered) >= len(rendered) / 5
