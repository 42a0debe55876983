"""The readers of files: data sets in the IDX format, manifests of models, and tokens."""

import gzip
import hashlib
import json
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz.target import Parts, Target
from serving.access.files import AccessError
from serving.access.tokens import TokenEntry, read_entries, write_entries
from serving.artifact import MANIFEST, MANIFEST_DIGEST, MODEL, ArtifactError, load
from serving.files.idx import read_idx

_MODEL_BYTES = b"a graph"
_IN_MEMORY = Path("/dev/shm")  # where a file is written a hundred times faster than on a disk
# Values in place of right ones. The last one stands for no value.
_VALUES: tuple[object, ...] = (
    None, True, -1, 0, 1, 1.5, float("nan"), float("inf"), 2**40, 10**400, "", "\0", "\ud800", "..", "a/b", "7",
    "x" * 500, [], [None], [[]], ["a", "a"], {}, {"": {}}, {"file": 1}, ...,
)  # fmt: skip


def _edited(text: bytes, parts: Parts) -> bytes:
    """Return a JSON text in which some values are others: for each a byte for its place, and one for the new value."""
    content = {"": json.loads(text)}
    while parts:
        places = _places(content)
        holder, key = places[parts.number() % len(places)]
        value = _VALUES[parts.number() % len(_VALUES)]
        if value is ...:
            del holder[key]
        else:
            holder[key] = json.loads(json.dumps(value))  # a copy, which a later edit may change
        if not content:
            break
    return json.dumps(content.get("")).encode()


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Return each value's holder, and its key or index in it."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found: list[tuple[Any, Any]] = []
    for key, value in pairs:
        found += [(content, key), *_places(value)]
    return found


@cache
def _folder() -> Path:
    """Return the folder of the files; it goes with the process's temporary files."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=_IN_MEMORY if _IN_MEMORY.is_dir() else None))
    (folder / "m" / "1").mkdir(parents=True)
    (folder / "m" / "1" / MODEL).write_bytes(_MODEL_BYTES)
    return folder


def run_idx(data: bytes) -> None:
    """Read an IDX file, gzipped or not."""
    parts = Parts(data)
    mode, content = parts.number(), parts.rest()
    try:
        images = read_idx(gzip.compress(content, mtime=0) if mode & 1 else content)
    except ValueError as error:
        assert len(str(error)) < 1000
    else:
        assert images.dtype == np.uint8 and 1 <= images.ndim <= 4 and images.size <= len(content) * 1032


def run_manifest(data: bytes) -> None:
    """Read a model's folder: a manifest with its digest, or any bytes in place of the digest."""
    parts = Parts(data)
    mode = parts.number()
    content = _edited(_right_manifest(), parts) if mode & 2 else parts.rest()
    folder = _folder() / "m" / "1"
    written = f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode()
    (folder / MANIFEST).write_bytes(content)
    (folder / MANIFEST_DIGEST).write_bytes(content if mode & 1 else written)
    try:
        artifact = load(folder)
    except ArtifactError:
        return
    assert (artifact.name, artifact.version) == ("m", "1") and artifact.labels
    assert artifact.test_error() and artifact.file().name in artifact.files


def run_tokens(data: bytes) -> None:
    """Read a file of tokens, and write what was read."""
    file, parts = _folder() / "tokens.json", Parts(data)
    mode = parts.number()
    file.write_bytes(_edited(_right_tokens()[0], parts) if mode & 2 else parts.rest())
    try:
        entries = read_entries(file)
    except AccessError as error:
        assert str(error).startswith("tokens: ")
        return
    write_entries(file, entries)
    assert read_entries(file) == entries


def _seeds_of_idx() -> list[bytes]:
    images = struct.pack(">4B3I", 0, 0, 8, 3, 2, 2, 3) + bytes(range(12))
    labels = struct.pack(">4BI", 0, 0, 8, 1, 5) + bytes(5)
    return [b"\0" + images, b"\1" + images, b"\0" + labels, b"\0" + gzip.compress(labels, mtime=0)]


def _seeds_of_manifests() -> list[bytes]:
    text = _right_manifest()
    return [b"\0" + text, b"\1" + text[:64], b"\2", b"\2\5\3", b"\2\7\4\x20\5\x30\x17"]


@cache
def _right_manifest() -> bytes:
    sha256 = hashlib.sha256(_MODEL_BYTES).hexdigest()
    field = {"order": "type, row, column", "types": 2, "grid": 3, "stride": 2, "size": 9, "offset": -1}
    variant = {"file": MODEL, "test_errors": 1, "test_images": 2, "tolerance": {"a": None}, "rounded": {"a": 0.5}}
    content = {
        "format": "capsnet-artifact-2",
        "name": "m",
        "version": "1",
        "labels": ["a", "b"],
        "inputs": {"images": {"dtype": "uint8", "shape": [None, 1, 2, 3]}},
        "outputs": {"poses": {"dtype": "float32", "shape": [None, 2, 4]}},
        "files": {MODEL: {"sha256": sha256, "bytes": len(_MODEL_BYTES)}},
        "variants": {"fp32": variant},
        "graphs": {"explain": {"file": MODEL, "images": 3, "max_a_difference": 1e-6, "receptive_field": field}},
        "tensorrt": {"batches": {"min": 1, "opt": 2, "max": 3}},
        "training": {"dataset": "d", "config": {}, "recipe": {}, "figures": {"epochs": 3}},
    }
    return json.dumps(content).encode()


def _seeds_of_tokens() -> list[bytes]:
    return [b"\0" + text for text in _right_tokens()] + [b"\2", b"\2\5\3", b"\2\7\4\x20\5"]


@cache
def _right_tokens() -> list[bytes]:
    entry = {"name": "alice", "roles": ["predict"], "hash": "scrypt$8192$8$1$AAAA$" + "A" * 43 + "=", "calls": 3}
    named = {"name": "bob", "roles": ["admin", "metrics"], "certificate": "bob", "rate": 0.5}
    TokenEntry(**{**entry, "roles": ("predict",)})  # type: ignore[arg-type]  # raises if the seed is wrong
    return [json.dumps({"tokens": tokens}).encode() for tokens in ([entry, named], [named], [])]


TARGETS = (
    Target("idx", run_idx, _seeds_of_idx),
    Target("manifest", run_manifest, _seeds_of_manifests),
    Target("tokens", run_tokens, _seeds_of_tokens),
)
