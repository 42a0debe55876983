"""One version's folder while it is written: under another name until it is whole, so that no server loads a part."""

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
    """Writes ``repository/name/version``: its files with their digests, and the manifest last.

    Used as a context manager, whose entry raises FileExistsError where that version is there, or another process is
    writing it. Where the block is left before ``finish``, nothing remains, and no folder that was made for it. What
    killed processes have left of this model's versions is removed at the entry.

    files: the SHA-256 of each file, hexadecimal, by name, in the order in which they were added.
    """

    def __init__(self, repository: Path, name: str, version: str) -> None:
        self.files: dict[str, str] = {}
        self._version_folder = repository / name / version
        # A name that neither our server nor Triton takes for a version.
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
        if self._version_folder.exists():  # since another process has just finished it
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
        """Take a file that somebody else has written into ``folder``."""
        self.files[name] = digest(self.folder / name)

    def remove(self, name: str) -> None:
        """Remove a file again."""
        (self.folder / name).unlink()
        del self.files[name]

    def finish(self, artifact: Artifact) -> Artifact:
        """Write the manifest of an artifact in ``folder``, give the folder its name, and return the artifact there."""
        write_manifest(artifact)
        self.folder.rename(self._version_folder)
        return replace(artifact, folder=self._version_folder)

    def _exists(self) -> FileExistsError:
        return FileExistsError(f"{self._version_folder}: exists already, and a version is never overwritten")

    def _leave(self) -> None:
        """Remove what is not finished, and let go of the folder."""
        if self.folder.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            for folder in reversed(self._made):
                with suppress(OSError):  # it is gone, or holds something else
                    folder.rmdir()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _lock(folder: Path) -> int | None:
    """Lock a folder for as long as this process lives and the descriptor returned is open; None where it is locked.

    A killed process lets go of its locks, so a partial folder that can be locked is one that nobody writes.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):  # and not one that has been renamed since
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
