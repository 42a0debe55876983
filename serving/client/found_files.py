"""The files that arguments of the command line stand for: files, folders, patterns and standard input."""

import glob
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

STANDARD_INPUT = "-"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm", ".pbm", ".pnm")
_IDX_PATTERN = re.compile(r"idx[34]-ubyte(\.gz)?$")
_ARCHIVE_LEFTOVERS = "__MACOSX"


@dataclass(frozen=True)
class Found:
    """A file. error: why an argument stands for no file; empty for a file."""

    path: Path
    error: str = ""

    @property
    def name(self) -> str:
        return "standard input" if self.is_standard_input else str(self.path)

    @property
    def is_standard_input(self) -> bool:
        return str(self.path) == STANDARD_INPUT

    def read(self) -> bytes:
        """Return the bytes of the file. Raises OSError."""
        if not self.is_standard_input:
            return self.path.read_bytes()
        if sys.stdin is None:
            raise OSError("it is closed")
        return sys.stdin.buffer.read()


def found_files(arguments: Sequence[Path]) -> list[Found]:
    """Return the files that arguments stand for, in order: those of a folder and of a pattern by name.

    Folders are read with the folders inside them. Hidden files, and files without a suffix of images, are left out.
    """
    return [found for argument in arguments for found in _found(argument)]


def _found(argument: Path) -> Iterator[Found]:
    if os.path.isdir(argument):
        yield from _in_folder(argument)
    elif glob.has_magic(str(argument)) and not os.path.exists(argument):
        matches = sorted(glob.glob(str(argument), recursive=True))
        if not matches:
            yield Found(argument, "no file matches")
        for match in matches:
            yield from _in_folder(Path(match)) if os.path.isdir(match) else (Found(Path(match)),)
    else:
        yield Found(argument)


def _in_folder(folder: Path) -> Iterator[Found]:
    files = sorted(_images_below(folder))
    if not files:
        yield Found(folder, f"a folder without images ({', '.join(_SUFFIXES)} or IDX)")
    yield from map(Found, files)


def _images_below(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != _ARCHIVE_LEFTOVERS]
        for name in names:
            if not name.startswith(".") and (name.lower().endswith(_SUFFIXES) or _IDX_PATTERN.search(name)):
                yield Path(place, name)
