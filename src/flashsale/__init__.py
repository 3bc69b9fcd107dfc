"""The contract of the flash-sale engine: what API, consumer and operator must agree on."""

from typing import Final

__version__: Final = "0.1.0"
