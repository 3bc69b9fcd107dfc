"""docs/metrics.md and the text that Prometheus reads, as the same kind of rows."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "metrics.md"
COMPONENTS = ("api", "consumer", "operator")


class Metric(NamedTuple):
    name: str
    of: str
    type: str
    labels: frozenset[str]


def documented() -> list[Metric]:
    """The rows of the table; one of "all" is one of each component."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \| (.*?) \|", PAGE.read_text(), re.MULTILINE)
    return [
        Metric(name, component, kind, frozenset(re.findall(r"`(\w+)`", labels)))
        for name, of, kind, labels in rows
        for component in (COMPONENTS if of == "all" else (of,))
    ]


def exposed(texts: Mapping[str, str]) -> list[Metric]:
    """What the components' texts have."""
    return [
        Metric(
            f"{family.name}_total" if family.type == "counter" else family.name,
            component,
            family.type,
            frozenset(label for sample in family.samples for label in sample.labels) - {"le"},
        )
        for component, text in texts.items()
        for family in text_string_to_metric_families(text)
    ]
