"""Files that are read again when they change: certificates and tokens are renewed without a restart."""

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

_CHECK_SECONDS = 1.0
_MAX_FILE_BYTES = 2**24

Content = TypeVar("Content")
#: The identity of each file's present version: device, inode, size and time of the last change.
_Versions = tuple[tuple[int, int, int, int], ...]

_logger = logging.getLogger(__name__)


class AccessError(ValueError):
    """A certificate or token file cannot be used. The text names the setting, the fault and what was expected."""


class Renewed(Generic[Content]):
    """The content of files, read again at most once a second if one of them has changed. Any thread may use it.

    read: reads all files. It raises AccessError or OSError, also at the first reading, in ``__init__``. A later fault
    is logged, and the earlier content stays.
    """

    def __init__(self, name: str, paths: Sequence[str], read: Callable[[], Content]) -> None:
        self._name = name
        self._paths = paths
        self._read = read
        self._lock = threading.Lock()
        self._versions = self._present_versions()
        self._content = read()
        self._check_at = time.monotonic() + _CHECK_SECONDS

    @property
    def content(self) -> Content:
        """Return the newest content that could be read."""
        if time.monotonic() >= self._check_at:
            self.check()
        return self._content

    def check(self) -> None:
        """Read the files now if one of them has changed."""
        with self._lock:
            self._check_at = time.monotonic() + _CHECK_SECONDS
            try:
                versions = self._present_versions()
                if versions == self._versions:
                    return
                content = self._read()
                if versions != self._present_versions():  # half of the files may be old: the next check reads them
                    return
            except (AccessError, OSError) as error:
                _logger.error("%s cannot be read again, the earlier ones stay in use: %s", self._name, error)
                return
            self._versions, self._content = versions, content
            _logger.info("%s were read again", self._name)

    def _present_versions(self) -> _Versions:
        found = [os.stat(path) for path in self._paths]
        for path, one in zip(self._paths, found, strict=True):  # a pipe would keep every call waiting
            if not stat.S_ISREG(one.st_mode) or one.st_size > _MAX_FILE_BYTES:
                raise AccessError(f"{self._name}: {path!r}; expected a file of at most {_MAX_FILE_BYTES} bytes")
        return tuple((one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for one in found)
