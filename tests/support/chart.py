"""Render the chart with Helm."""

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import pytest

from tests.support.manifests import parsed
from tests.support.paths import CHART

Manifest = dict[str, Any]
CRD_RESOURCE: Final = "customresourcedefinition.apiextensions.k8s.io/flashsales.flashsale.dev"
"""The CRD of FlashSale in kubectl's notation."""
COMPONENTS: Final = ("api", "consumer", "operator")
RELEASE: Final = "shop"
NAMESPACE: Final = "sales"
ADDRESSES: Final[dict[str, Any]] = {
    "redis": {"url": "redis://redis:6379/0"},
    "kafka": {"bootstrap": "kafka:9092"},
    "database": {"existingSecret": {"name": "ledger"}},
}


class Refused(Exception):
    """A program refused its input. The message is the program's output."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """The manifests of a release. `hooks` are the manifests that only `helm test` installs."""

    manifests: list[Manifest]
    hooks: list[Manifest]

    @classmethod
    def of(cls, text: str) -> Self:
        found = parsed(text)
        hooks = [each for each in found if "helm.sh/hook" in str(each["metadata"])]
        return cls([each for each in found if each not in hooks], hooks)

    def all(self, kind: str) -> list[Manifest]:
        return [each for each in self.manifests if each["kind"] == kind]

    def one(self, kind: str, component: str) -> Manifest:
        (found,) = (
            each
            for each in self.all(kind)
            if each["metadata"]["labels"].get("app.kubernetes.io/component") == component
        )
        return found

    def pod(self, component: str) -> Manifest:
        template: Manifest = self.one("Deployment", component)["spec"]["template"]
        return template

    def container(self, component: str) -> Manifest:
        (container,) = self.pod(component)["spec"]["containers"]
        return dict(container)

    def environment(self, component: str) -> dict[str, Any]:
        return {
            each["name"]: each.get("value", each.get("valueFrom"))
            for each in self.container(component)["env"]
        }


@dataclass(frozen=True, slots=True)
class Helm:
    """The real Helm, isolated from the user's own settings."""

    program: Path
    home: Path
    _rendered: dict[str, Rendered] = field(default_factory=dict)

    def run(self, *arguments: str, values: Manifest, kubeconfig: Path | None = None) -> str:
        """Run a command that takes values and return its output. Raises `Refused` if it fails."""
        return self.run_plain(
            *arguments, "--values", "-", stdin=json.dumps(values), kubeconfig=kubeconfig
        )

    def run_plain(self, *arguments: str, stdin: str = "", kubeconfig: Path | None = None) -> str:
        """Run a command and return its output. Raises `Refused` if it fails."""
        own = {"HOME": str(self.home), "KUBECONFIG": str(kubeconfig or self.home / "none")}
        done = subprocess.run(
            [str(self.program), *arguments],
            input=stdin,
            env={"PATH": os.environ["PATH"], **own},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise Refused(done.stderr + done.stdout)
        return done.stdout

    def render(self, *changes: Manifest) -> Rendered:
        """Render the chart with the addresses in `ADDRESSES` and these values on top."""
        return self.render_only(merged(ADDRESSES, *changes))

    def render_only(self, values: Manifest) -> Rendered:
        """Render the chart with these values alone. Results are cached."""
        key = json.dumps(values)
        if key not in self._rendered:
            text = self.run("template", RELEASE, str(CHART), "-n", NAMESPACE, values=values)
            self._rendered[key] = Rendered.of(text)
        return self._rendered[key]


def at(path: str, value: object) -> Manifest:
    """Nest a value under its path: `at("api.replicas", 2)` is `{"api": {"replicas": 2}}`."""
    for key in reversed(path.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def merged(*layers: Manifest) -> Manifest:
    """Merge layers of values as Helm does. Later layers win."""
    result: Manifest = {}
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            both = isinstance(old, dict) and isinstance(value, dict)
            result[key] = merged(old, value) if both else value  # type: ignore[arg-type] # both are
    return result


def each_combination(
    expectations: Sequence[tuple[str, dict[str, Any], Callable[[Rendered], Any], object]],
) -> pytest.MarkDecorator:
    """Run a test with each name, changes of values, part of the manifests, and expected part."""
    return pytest.mark.parametrize(
        ("changes", "actual", "expected"),
        [each[1:] for each in expectations],
        ids=[each[0] for each in expectations],
    )
