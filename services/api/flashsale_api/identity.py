"""Reservation ids. The API makes them before the script call, so that it can repeat the call."""

import os
import time
from hashlib import sha256
from typing import Final

_FREE: Final = ~(0b1111 << 76 | 0b11 << 62) & (1 << 128) - 1
"""Mask of the bits of a UUID other than version and variant."""


def reservation_id(item_id: str, user_id: str, request_key: str) -> str:
    """Returns the same id for the same item, user and key. Returns a new id if the key is empty.

    The id is a UUIDv8 of a SHA-256, or a UUIDv7 if the key is empty (RFC 9562, sections 5.7, 5.8).
    """
    if request_key:
        # No field contains a newline, so different triples never give the same text.
        digest = sha256(f"{item_id}\n{user_id}\n{request_key}".encode()).digest()
        return _uuid(8, int.from_bytes(digest[:16], "big"))
    random = int.from_bytes(os.urandom(10), "big")
    return _uuid(7, (time.time_ns() // 1_000_000) << 80 | random)


def _uuid(version: int, bits: int) -> str:
    bits = bits & _FREE | version << 76 | 0b10 << 62
    digits = f"{bits:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
