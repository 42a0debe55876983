"""Compressed data that inflates to much, made without compressing all of it."""

import zlib
from functools import cache


@cache
def inflating(block: bytes, count: int) -> bytes:
    """Return zlib data that inflates to ``block * count``, compressed once: a full flush ends its history."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    part = squeeze.compress(block) + squeeze.flush(zlib.Z_FULL_FLUSH)
    checksum = 1
    for _ in range(count):
        checksum = zlib.adler32(block, checksum)
    return b"\x78\xda" + part * count + squeeze.flush() + checksum.to_bytes(4)
