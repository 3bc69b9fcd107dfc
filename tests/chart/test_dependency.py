"""Another chart has this chart as a dependency, under a name of its own."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.chart import ADDRESSES, NAMESPACE, RELEASE, Helm, Refused, Rendered
from tests.support.manifests import documents
from tests.support.paths import CHART


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    (own,) = documents(CHART / "Chart.yaml")
    dependency = {name: own[name] for name in ("name", "version")}
    dependency |= {"alias": "sales", "condition": "sales.enabled"}
    chart = {"apiVersion": "v2", "name": "shop", "version": "1.0.0", "dependencies": [dependency]}
    (tmp_path / "Chart.yaml").write_text(yaml.safe_dump(chart))
    shutil.copytree(CHART, tmp_path / "charts" / "flashsale")
    return tmp_path


def rendered(chart: Helm, parent: Path, values: dict[str, Any]) -> Rendered:
    text = chart.run("template", RELEASE, str(parent), "-n", NAMESPACE, values=values)
    return Rendered.of(text)


def test_a_chart_with_globals_may_have_it_as_a_dependency(chart: Helm, parent: Path) -> None:
    values = {"global": {"imageRegistry": "registry.example"}, "sales": ADDRESSES}
    names = {each["metadata"]["name"] for each in rendered(chart, parent, values).all("Deployment")}
    assert names == {"shop-sales-api", "shop-sales-consumer", "shop-sales-operator"}


@pytest.mark.parametrize("enabled", [True, False])
def test_a_condition_of_the_parent_switches_it(chart: Helm, parent: Path, enabled: bool) -> None:
    found = rendered(chart, parent, {"sales": {**ADDRESSES, "enabled": enabled}})
    assert bool(found.manifests) is enabled


def test_the_chart_alone_cannot_be_switched_off(chart: Helm) -> None:
    with pytest.raises(Refused, match="'/enabled'"):
        chart.render({"enabled": False})
