"""Reading of files by path, as open files and as bytes, with a word on what is often given by mistake."""

import base64
import binascii
import glob
import inspect
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.client.errors import ItemError, brief
from serving.files.idx import GZIP_MAGIC, is_idx, read_idx

#: The formats that Pillow opens here. Others are rare, and the readers of some run programs.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
FORMAT_NAMES = "PNG, JPEG, GIF, BMP, WebP, TIFF, PPM or IDX"

_MAX_HEAD_BYTES = 512
_MIN_BASE64_CHARACTERS = 32
_MAX_PATH_CHARACTERS = 200
_ADDRESS_PATTERN = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_BASE64_PATTERN = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_OBJECT_TEXT_PATTERN = re.compile(r"<[^<>]+ (at 0x[0-9a-f]+|name=[^<>]*|mode=[^<>]*|size=[^<>]*)[^<>]*>")
_BYTES_TEXT_PATTERN = re.compile(r"(b|bytearray\(b)(['\"])(\\x[0-9a-f]{2}|GIF8|BM|RIFF|II\*|MM)")
# The beginnings of image files: PNG, JPEG, GIF, BMP, WebP, TIFF in both byte orders, and gzipped IDX.
MAGICS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*", GZIP_MAGIC)
_HEX_PATTERN = re.compile("|".join(magic.hex() for magic in MAGICS if len(magic) > 2), re.IGNORECASE)
# The beginnings of files that are none of these, and their names.
_OTHER_FILES = (
    (re.compile(rb"....ftyp(heic|heix|mif1|msf1|hevc)", re.DOTALL), "a HEIC photograph"),
    (re.compile(rb"....ftypavif", re.DOTALL), "an AVIF image"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "a JPEG 2000 image"),
    (re.compile(rb"\0\0\0\x0cJXL |\xff\x0a"), "a JPEG XL image"),
    (re.compile(rb"\x00\x00\x01\x00"), "an icon"),
    (re.compile(rb"8BPS"), "a file of Photoshop"),
    (re.compile(rb"%PDF"), "a PDF file"),
    (re.compile(rb"PK\x03\x04"), "a ZIP file"),
    (re.compile(rb"\x93NUMPY"), "a file of numpy.save, which numpy.load reads"),
    (re.compile(rb"version https://git-lfs"), "a pointer of Git LFS, whose file is elsewhere"),
    (re.compile(rb"\s*(<\?xml[^>]*>\s*)?<svg", re.IGNORECASE), "an SVG drawing"),
    (re.compile(rb"\s*<(!doctype )?html", re.IGNORECASE), "a page of HTML"),
    (re.compile(rb"\s*(\{\s*\"|\[\s*[\[{\"\d])"), "a text in JSON"),
)


def is_file(item: object) -> bool:
    """Return True for an open file, and for anything else with a method ``read``."""
    return callable(getattr(item, "read", None))


def read_path(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a file. Raises ItemError, which says what the path is if it is none."""
    name = os.fspath(path)
    if not name:
        raise ItemError("an empty path; expected the path of a file")
    try:
        return Path(name).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        if mistake := mistaken_text(name):
            raise ItemError(f"{mistake.found}; expected {mistake.expected}") from error
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = "; expected files, such as sorted(folder.glob('*.png'))" if isinstance(error, IsADirectoryError) else ""
        raise ItemError(f"{named(name)}: {reason}{hint}") from error


def named(path: str) -> str:
    """Return a path for an error, in one line and not too long."""
    shown = path if path.isprintable() else repr(path)
    return shown if len(shown) <= _MAX_PATH_CHARACTERS else brief(shown)


def read_file(file: Any) -> bytes:
    """Return the rest of an open file. Raises ItemError."""
    try:
        data = file.read()
    except Exception as error:  # it may be an object of any library
        raise ItemError(f"an open file that cannot be read ({brief(str(error))})") from error
    if inspect.isawaitable(data):
        if inspect.iscoroutine(data):
            data.close()
        raise ItemError("an asynchronous file; expected its bytes, which await file.read() gives")
    if isinstance(data, str):
        raise ItemError("a file that was opened as text; expected one opened in binary mode ('rb')")
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ItemError(f"an open file that gives {type(data).__name__}; expected bytes")
    if not data:
        raise ItemError("an open file with no bytes left; file.seek(0) goes back to its start")
    return bytes(data)


def parse(data: bytes) -> bytes | NDArray[np.uint8]:
    """Return the content of a file: an array for an IDX file, else the bytes unchanged. Raises ItemError."""
    if not (is_idx(data[:4]) or data.startswith(GZIP_MAGIC)):
        if mistake := _mistaken_bytes(data):
            raise ItemError(mistake)
        return data
    try:
        images = read_idx(data)
    except ValueError as error:
        if data.startswith(GZIP_MAGIC) and "not an IDX file" in str(error):
            raise ItemError("a gzipped file without IDX in it; expected it unpacked: gzip.decompress(data)") from error
        raise ItemError(str(error)) from error
    if images.ndim < 3:
        raise ItemError("an IDX file of labels or single values; expected one of images")
    return images[:, np.newaxis] if images.ndim == 3 else images


class Mistake(NamedTuple):
    """Another thing than a path: what it is, and what a program should give instead."""

    found: str
    expected: str


def mistaken_text(text: str) -> Mistake | None:
    """Return what a path is instead of a path, or None if it may be one."""
    if text[:5].lower() == "data:":
        return Mistake("a data URL", "its bytes: base64.b64decode(url.partition(',')[2])")
    if _ADDRESS_PATTERN.match(text):
        return Mistake(f"{brief(text)}: a URL", "a path, or the bytes: urllib.request.urlopen(url).read()")
    if _is_base64(text):
        return Mistake(f"{len(text)} characters of base64", "a path, or the bytes: base64.b64decode(text)")
    if _HEX_PATTERN.match(text):
        return Mistake(f"{len(text)} hexadecimal digits", "a path, or the bytes: bytes.fromhex(text)")
    if _BYTES_TEXT_PATTERN.match(text):
        return Mistake("the text of bytes", "the bytes themselves")
    if _OBJECT_TEXT_PATTERN.fullmatch(text):
        return Mistake(f"{brief(text)}: the text of an object", "the object itself")
    if name := _other_file(text.encode(errors="replace")):
        return Mistake(name, "a path")
    if glob.has_magic(text):
        return Mistake(f"{brief(text)}: no file, but a pattern", "files, such as sorted(glob.glob(pattern))")
    if text.startswith("~"):
        return Mistake(f"{brief(text)}: no file, and ~ is not replaced", "Path(path).expanduser()")
    if text.count("\n") > 1:
        return Mistake(f"a text of {len(text)} characters", "a path")
    return None


def _mistaken_bytes(data: bytes) -> str:
    """Return what bytes are instead of an image file, or "" if they may be one."""
    if not data:
        return f"0 bytes; expected an image: {FORMAT_NAMES}"
    if data.startswith(MAGICS):
        return ""
    if name := _other_file(data):
        return f"{name}; expected an image: {FORMAT_NAMES}"
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError:
        return ""
    if len(text) < _MAX_HEAD_BYTES and text.isprintable() and os.path.isfile(text):
        return f"the bytes of a path; expected the path as str: {brief(text)!r}"
    mistake = mistaken_text(text)
    return f"{mistake.found}; expected {mistake.expected}" if mistake else ""


def _other_file(data: bytes) -> str:
    """Return the name of a file that is no image, by its beginning, or ""."""
    head = data[:_MAX_HEAD_BYTES]
    return next((name for pattern, name in _OTHER_FILES if pattern.match(head)), "")


def _is_base64(text: str) -> bool:
    """Return True for the base64 of an image file."""
    start = "".join(text[:_MAX_HEAD_BYTES].split())
    if len(start) < _MIN_BASE64_CHARACTERS or not _BASE64_PATTERN.fullmatch(start):
        return False
    try:
        begin = base64.b64decode(start[:_MIN_BASE64_CHARACTERS], altchars=b"-_" if set("-_") & set(start) else b"+/")
    except binascii.Error:
        return False
    return begin.startswith(MAGICS)
