"""The FlashSale resource's name: the one constant that docs/adr/0008 speaks of."""

from typing import Final

GROUP: Final = "flashsale.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "FlashSale"
PLURAL: Final = "flashsales"
