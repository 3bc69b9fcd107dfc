"""Reservation ids. The API makes them before the script call, so that it can repeat the call."""

import os
import time
from collections.abc import Iterator
from hashlib import sha256
from typing import Final

_VARIANT: Final = {digit: "89ab"[int(digit, 16) % 4] for digit in "0123456789abcdef"}
"""The digit with the variant of a UUID, by the random digit in its place."""


def reservation_id(item_id: str, user_id: str, request_key: str) -> str:
    """Returns the same id for the same item, user and key. Returns a new id if the key is empty.

    The id is a UUIDv8 of a SHA-256, or a UUIDv7 if the key is empty (RFC 9562, sections 5.7, 5.8).
    """
    if request_key:
        # No field contains a newline, so different triples never give the same text.
        digits = sha256(f"{item_id}\n{user_id}\n{request_key}".encode()).hexdigest()
        return (
            f"{digits[:8]}-{digits[8:12]}-8{digits[13:16]}-"
            f"{_VARIANT[digits[16]]}{digits[17:20]}-{digits[20:32]}"
        )
    since_1970 = f"{time.time_ns() // 1_000_000:012x}"
    return f"{since_1970[:8]}-{since_1970[8:]}-7{next(_random)}"


def _random_digits() -> Iterator[str]:
    """Yields the random digits of a UUID, from its version on. Asks the kernel for many at once."""
    while True:
        block = os.urandom(10 * 256).hex()
        for begin in range(0, len(block), 20):
            digits = block[begin : begin + 19]
            yield f"{digits[:3]}-{_VARIANT[digits[3]]}{digits[4:7]}-{digits[7:]}"


_random: Final = _random_digits()
