"""Reservation ids, minted before Redis is asked, so that a call can safely be sent again."""

import os
import time
from hashlib import sha256
from typing import Final

_FREE: Final = ~(0b1111 << 76 | 0b11 << 62) & (1 << 128) - 1
"""The bits of a UUID that are neither version nor variant."""


def reservation_id(item_id: str, user_id: str, request_key: str) -> str:
    """The id of a request: the same for the same key of the same user for the same item.

    With a key a UUIDv8 of its SHA-256, without one a UUIDv7 (RFC 9562, sections 5.7 and 5.8).
    """
    if request_key:
        # No field holds a newline: two different triples never give the same text.
        digest = sha256(f"{item_id}\n{user_id}\n{request_key}".encode()).digest()
        return _uuid(8, int.from_bytes(digest[:16], "big"))
    random = int.from_bytes(os.urandom(10), "big")
    return _uuid(7, (time.time_ns() // 1_000_000) << 80 | random)


def _uuid(version: int, bits: int) -> str:
    bits = bits & _FREE | version << 76 | 0b10 << 62
    digits = f"{bits:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
