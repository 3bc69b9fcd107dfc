"""The limits of a buyer's connection."""

from typing import Final

REQUEST_SECONDS: Final = 10.0
"""Time to send a whole request, and to read an answer.

The check runs once per this interval, so a connection is closed after at most twice this time.
"""
CLOSE_SECONDS: Final = 2.0
"""Time to read the last answers of a server that stops."""
MAX_HEAD_BYTES: Final = 64 * 1024
"""Limit for all bytes of a request except its body: head, trailers and the framing of chunks.

The requests of a connection that wait for an earlier answer have this limit together.
"""
MAX_FIELDS: Final = 100
"""Limit for the header and trailer fields of a request."""
MAX_UNFINISHED_BYTES: Final = 64 * 1024 * 1024
"""Limit for the memory of all requests of buyers that are incomplete or wait for another.

Unread answers count, too. A client that exceeds the limit is reset. A request that arrives in one
piece does not count while it is answered.
"""
MAX_UNFINISHED_ORDER_BYTES: Final = 16 * 1024 * 1024
"""The same limit for the clients of the order port. So a flood of buyers does not reset them."""
PIECE_BYTES: Final = 4 * 1024
"""The parser gets a longer read in pieces of this size.

It does not say where a request begins. So a request that begins behind another one counts all of
its first piece.
"""
FIELD_BYTES: Final = 150
"""The memory that a header field takes besides its bytes."""
REQUEST_BYTES: Final = 2_300
"""The memory that a waiting request takes besides its bytes and header fields.

Measured with 16,000 waiting requests of the ASGI path, which takes more than the direct one.
"""
MAX_PIPELINED: Final = 16
"""Requests of a connection that wait for the answer to an earlier one."""
SOCKET_BYTES: Final = 32 * 1024
"""Size of each of the kernel's buffers of a connection. A pod's memory limit counts them."""
UNREAD_BYTES: Final = 3 * SOCKET_BYTES
"""The memory that a full buffer of answers takes in the kernel.

The kernel doubles the buffer's size for its own use, and exceeds it by a part of a segment.
"""
