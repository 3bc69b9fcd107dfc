"""Rules for the fields of HTTP requests, Kafka events and manifests.

The patterns end in `\\Z`, because `$` would accept a trailing newline. No field may contain a comma
or a newline, because these separate the fields and lines that the Lua scripts receive.
"""

import re
from typing import Annotated, Final

from msgspec import Meta

MAX_QUANTITY: Final = 1_000
MAX_STOCK: Final = 100_000_000
MAX_PER_USER: Final = 1_000
MAX_DISPLAY_NAME: Final = 128
MAX_HOLD_SECONDS: Final = 86_400
MAX_EXPIRED_HOLDS: Final = 1_000

ITEM_ID_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._~-]{0,127}\Z"
USER_ID_PATTERN: Final = r"^[A-Za-z0-9._~@:|+=-]{1,128}\Z"
SALE_ID_PATTERN: Final = r"^[a-z0-9][a-z0-9.-]{0,252}/[a-z0-9][a-z0-9.-]{0,252}\Z"
UUID_PATTERN: Final = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z"

# For values that are no part of a body.
ITEM_ID: Final = re.compile(ITEM_ID_PATTERN)
USER_ID: Final = re.compile(USER_ID_PATTERN)
RESERVATION_ID: Final = re.compile(UUID_PATTERN)

ItemId = Annotated[str, Meta(pattern=ITEM_ID_PATTERN)]
UserId = Annotated[str, Meta(pattern=USER_ID_PATTERN)]
RequestKey = Annotated[str, Meta(pattern=USER_ID_PATTERN)]
OrderRef = Annotated[str, Meta(pattern=USER_ID_PATTERN)]
SaleId = Annotated[str, Meta(pattern=SALE_ID_PATTERN)]
ReservationId = Annotated[str, Meta(pattern=UUID_PATTERN)]
Quantity = Annotated[int, Meta(ge=1, le=MAX_QUANTITY)]
Units = Annotated[int, Meta(ge=0, le=2**53)]
"""Units of stock. Lua counts in doubles, which are exact up to 2**53."""
Version = Annotated[int, Meta(ge=1, le=2**53)]
Revision = Annotated[int, Meta(ge=1, le=2**53)]
EngineId = Annotated[str, Meta(pattern=UUID_PATTERN)]
