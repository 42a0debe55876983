"""Reading of files in a folder that others can write to: regular files inside the folder, up to a size."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path


class RefusedFile(ValueError):
    """A file is not read. The text says why, and does not name the file."""


@contextmanager
def opened(path: Path, root: Path, max_bytes: int, setting: str = "") -> Iterator[BufferedReader]:
    """Open a file to read its bytes.

    Symbolic links may lead to places inside ``root`` only. Raises RefusedFile if the file is outside, is no regular
    file, or has more than ``max_bytes`` bytes; OSError if it cannot be opened. Never waits for the writer of a pipe.
    setting: the name of the setting with this limit, for the error.
    """
    try:
        real = path.resolve(strict=True)
    except RuntimeError as error:  # a loop of links, before Python 3.13
        raise RefusedFile("a link that leads to itself") from error
    if not real.is_relative_to(root.resolve()):
        raise RefusedFile("a link that leads out of the repository")
    descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise RefusedFile("not a regular file")
        if state.st_size > max_bytes:
            raise RefusedFile(f"{state.st_size} bytes; the limit is {max_bytes} bytes{_named(setting)}")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_whole(path: Path, root: Path, max_bytes: int, setting: str = "") -> bytes:
    """Return the bytes of a file. Raises as ``opened``, also if the file grows while it is read."""
    with opened(path, root, max_bytes, setting) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1)  # memory for as many bytes is taken first, so it is not the limit
    if len(content) > size:
        raise RefusedFile("it grew while it was read")
    return content


def _named(setting: str) -> str:
    return f" ({setting})" if setting else ""
