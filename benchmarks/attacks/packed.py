"""Compressed bytes that take a reader long, and give it nothing or much."""

import gzip
from functools import cache

#: Eight blocks of zlib's format (RFC 1951, section 3.2.7), each with the tables of a code and nothing else.
_EMPTY_BLOCKS = bytes.fromhex(
    "04c081000000000090ff6b100007020000000040feaf41001c080000000000f9bf060170200000000000e4ff1a"
    "04c081000000000090ff6b100007020000000040feaf41001c080000000000f9bf060170200000000000e4ff1a"
)
_LAST_BLOCK = b"\x03\0"
_GZIP_HEAD = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
_GZIP_TAIL = bytes(8)  # the checksum of nothing, and its size
_ZLIB_HEAD = b"\x78\x01"


@cache
def _blocks(size: int) -> bytes:
    return _EMPTY_BLOCKS * (size // len(_EMPTY_BLOCKS))


def empty_gzip(size: int) -> bytes:
    """Return about ``size`` bytes of gzip that give nothing."""
    return _GZIP_HEAD + _blocks(size) + _LAST_BLOCK + _GZIP_TAIL


def empty_zlib(size: int) -> bytes:
    """Return about ``size`` bytes of the beginning of zlib's format that give nothing."""
    return _ZLIB_HEAD + _blocks(size)


@cache
def bomb(repeated: bytes, size: int) -> bytes:
    """Return some repeated bytes, of this size at most, compressed by gzip."""
    return gzip.compress(repeated * (size // len(repeated)), mtime=0)
