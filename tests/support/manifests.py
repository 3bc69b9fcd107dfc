"""The manifest of a FlashSale."""

from typing import Any

from flashsale_operator.sales.manifest import API_VERSION, KIND


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
