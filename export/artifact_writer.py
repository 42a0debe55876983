"""The writer of a version's folder. It has another name until it is complete, so that no server loads a part."""

import fcntl
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import onnx

from serving.artifact import Artifact, digest, write_manifest

_SUFFIX = ".partial"


class ArtifactWriter:
    """The writer of ``repository/name/version``: its files with their digests, and the manifest last.

    It is a context manager. Its entry raises FileExistsError if the version exists or another process writes it, and it
    removes the remains of killed processes. If the block ends before ``finish``, all files and new folders are removed.

    files: the SHA-256 of each file, hexadecimal, by name, in the order in which they were added.
    """

    def __init__(self, repository: Path, name: str, version: str) -> None:
        self.files: dict[str, str] = {}
        self._version_folder = repository / name / version
        # Neither this server nor Triton takes this name for a version.
        self.folder = repository / name / f".{version}{_SUFFIX}"
        self._lock = -1
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        if self._version_folder.exists():
            raise self._exists()
        for folder in reversed(self.folder.parents):
            if not folder.exists():
                self._made.append(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(self.folder)
        if lock is None:
            raise FileExistsError(f"{self._version_folder}: another export of it is under way")
        self._lock = lock
        if self._version_folder.exists():  # another process has just finished it
            self._leave()
            raise self._exists()
        _clear(self.folder)
        for other in self.folder.parent.glob(f".*{_SUFFIX}"):
            if other != self.folder and (left := _lock(other)) is not None:
                shutil.rmtree(other, ignore_errors=True)
                os.close(left)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def save_graph(self, name: str, model: onnx.ModelProto) -> Path:
        """Write a graph and return its file."""
        path = self.folder / name
        onnx.save_model(model, path)
        self.add(name)
        return path

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        (self.folder / name).write_text(text, encoding="utf-8")
        self.add(name)

    def add(self, name: str) -> None:
        """Add a file that other code has written into ``folder``."""
        self.files[name] = digest(self.folder / name)

    def remove(self, name: str) -> None:
        """Remove an added file."""
        (self.folder / name).unlink()
        del self.files[name]

    def finish(self, artifact: Artifact) -> Artifact:
        """Write the manifest, give the folder its final name, and return the artifact."""
        write_manifest(artifact)
        self.folder.rename(self._version_folder)
        return replace(artifact, folder=self._version_folder)

    def _exists(self) -> FileExistsError:
        return FileExistsError(f"{self._version_folder}: exists already, and a version is never overwritten")

    def _leave(self) -> None:
        """Remove an unfinished folder, and release the lock."""
        if self.folder.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            for folder in reversed(self._made):
                with suppress(OSError):  # the folder is gone, or has other content
                    folder.rmdir()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _lock(folder: Path) -> int | None:
    """Lock a folder while this process lives and the returned descriptor is open. Return None if it is locked.

    A killed process releases its locks, so no process writes a partial folder that can be locked.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):  # not a folder that was renamed meanwhile
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
