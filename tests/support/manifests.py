"""The manifest of a FlashSale, and the manifests of files."""

import re
from pathlib import Path
from typing import Any

import yaml

from flashsale_operator.sales.manifest import API_VERSION, KIND
from tests.support.paths import ROOT


def flash_sale(
    name: str, item: str | None = None, *, namespace: str | None = None, **spec: object
) -> dict[str, Any]:
    """Make a FlashSale. Its item has the same name unless `item` names another."""
    metadata = {"name": name} if namespace is None else {"name": name, "namespace": namespace}
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": metadata,
        "spec": {"itemId": item or name, **spec},
    }


def parsed(text: str) -> list[dict[str, Any]]:
    """Return the manifests of a text. The parser in C is ten times as fast as `safe_load`."""
    return [each for each in yaml.load_all(text, Loader=yaml.CSafeLoader) if each]


def documents(file: Path) -> list[dict[str, Any]]:
    """Return the manifests of a file of the repository."""
    return parsed((ROOT / file).read_text())


def with_stand_ins(file: Path) -> list[dict[str, Any]]:
    """Return the manifests of a file for a cluster of `dev/cluster`, whose images have no digests.

    Their containers request little CPU, because the node is small.
    """
    text = re.sub("@sha256:[0-9a-f]{64}", "", (ROOT / file).read_text())
    found = parsed(text)
    for each in found:
        if each["kind"] in ("StatefulSet", "Job"):
            (container,) = each["spec"]["template"]["spec"]["containers"]
            container["resources"]["requests"]["cpu"] = "50m"
    return found


def scripts(file: Path) -> dict[str, str]:
    """Return the files in a manifest's ConfigMap."""
    (found,) = (each["data"] for each in documents(file) if each["kind"] == "ConfigMap")
    return dict(found)


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector matches. Only the operator In is known."""
    return all(
        labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()
    ) and all(
        each["operator"] == "In" and labels.get(each["key"]) in each["values"]
        for each in selector.get("matchExpressions", [])
    )
