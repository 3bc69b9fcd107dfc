"""The contract of the flash-sale engine, which API, consumer and operator share."""

from typing import Final

__version__: Final = "0.1.0"
