"""Manifests: of a FlashSale, and those in the repository's files."""

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


def documents(file: Path) -> list[dict[str, Any]]:
    """Return the objects in a YAML file of the repository."""
    return [each for each in yaml.safe_load_all((ROOT / file).read_text()) if each]
