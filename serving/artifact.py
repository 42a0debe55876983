"""The artifact: the folder that passes from export to serving, its manifest, and its verification.

``<repository>/<name>/<version>/`` holds ``model.onnx``, the network in single precision; further graphs, which the
manifest names; ``manifest.json`` with the digest of each file; and ``manifest.sha256`` with the manifest's own, as
``sha256sum`` writes it. The manifest is written last, so a folder without one is an export that did not finish.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = "capsnet-artifact-2"
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
MODEL = "model.onnx"
#: The precisions that a network may be there in; the first always is.
PRECISIONS = ("fp32", "int8", "fp16")


class ArtifactError(ValueError):
    """A model folder that is missing, unfinished, changed or of another format; the text names the file."""


@dataclass(frozen=True)
class Artifact:
    """One version of one model, its files verified against the manifest.

    image_shape: (C, H, W) of the uint8 input ``images``, (B, C, H, W).
    pose_size: E, of the output ``poses``, (B, J, E); J is the number of labels, and ``probabilities`` is (B, J).
    files: the SHA-256 of each file but the manifest's two, hexadecimal, by name.
    variants: by precision, what each graph that classifies is: its ``file``, and the figures of its certificate.
    graphs: by name, what further graphs are, ``explain`` and ``decoder``.
    batches: what TensorRT is to expect, ``min``, ``opt`` and ``max`` images.
    training: dataset, config, recipe and figures of the training run.
    """

    folder: Path
    name: str
    version: str
    labels: tuple[str, ...]
    image_shape: tuple[int, int, int]
    pose_size: int
    files: dict[str, str]
    variants: dict[str, dict[str, Any]]
    graphs: dict[str, dict[str, Any]]
    batches: dict[str, int]
    training: dict[str, Any]

    def file(self, precision: str = PRECISIONS[0]) -> Path:
        """The graph that classifies in this precision. Raises ArtifactError where there is none."""
        if precision not in self.variants:
            known = ", ".join(self.variants)
            raise ArtifactError(f"{self.folder / MANIFEST}: has no graph in {precision}; there is: {known}")
        return self.folder / str(self.variants[precision]["file"])

    def sha256(self, precision: str = PRECISIONS[0]) -> str:
        """Of the graph in this precision, hexadecimal."""
        return self.files[self.file(precision).name]

    def test_error(self, precision: str = PRECISIONS[0]) -> str:
        """The measured test error in this precision, for people: ``0.42 % (42 of 10000)``."""
        errors, images = (self.variants[precision][name] for name in ("test_errors", "test_images"))
        return f"{100 * errors / images:.2f} % ({errors} of {images})"


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest(artifact: Artifact) -> dict[str, Any]:
    """The manifest's content for an artifact whose files are written."""
    classes, pose = len(artifact.labels), artifact.pose_size
    return {
        "format": FORMAT,
        "name": artifact.name,
        "version": artifact.version,
        "labels": list(artifact.labels),
        "inputs": {"images": {"dtype": "uint8", "shape": [None, *artifact.image_shape]}},
        "outputs": {
            "probabilities": {"dtype": "float32", "shape": [None, classes]},
            "poses": {"dtype": "float32", "shape": [None, classes, pose]},
        },
        "files": {
            name: {"sha256": sha256, "bytes": (artifact.folder / name).stat().st_size}
            for name, sha256 in artifact.files.items()
        },
        "variants": artifact.variants,
        "graphs": artifact.graphs,
        "tensorrt": {"batches": artifact.batches},
        "training": artifact.training,
    }


def write_manifest(artifact: Artifact) -> None:
    """Write ``manifest.sha256`` and then ``manifest.json``, under its name only once it is whole."""
    content = (json.dumps(manifest(artifact), indent=2) + "\n").encode()
    (artifact.folder / MANIFEST_DIGEST).write_text(f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n")
    partial = artifact.folder / (MANIFEST + ".partial")
    partial.write_bytes(content)
    partial.replace(artifact.folder / MANIFEST)


def load(folder: Path) -> Artifact:
    """Read and verify one version's folder.

    Raises ArtifactError naming the file: no manifest, not JSON, another format, a field missing, or a file whose
    SHA-256 is not the one written down.
    """
    path = folder / MANIFEST
    content = _read_manifest(path)
    try:
        _, channels, height, width = content["inputs"]["images"]["shape"]
        result = Artifact(
            folder=folder,
            name=content["name"],
            version=content["version"],
            labels=tuple(content["labels"]) if isinstance(content["labels"], list) else (),
            image_shape=(channels, height, width),
            pose_size=content["outputs"]["poses"]["shape"][2],
            files={name: file["sha256"] for name, file in content["files"].items()},
            variants=content["variants"],
            graphs=content["graphs"],
            batches=content["tensorrt"]["batches"],
            training=content["training"],
        )
        named = {str(part["file"]) for part in (*result.variants.values(), *result.graphs.values())}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ArtifactError(f"{path}: a field is missing or malformed ({error!r})") from error
    _check(result, path)
    if unknown := named - result.files.keys():
        raise ArtifactError(f"{path}: files has no digest of {', '.join(sorted(unknown))}")
    for name, sha256 in result.files.items():
        _check_digest(folder / name, sha256, MANIFEST)
    return result


def _read_manifest(path: Path) -> dict[str, Any]:
    """Raises ArtifactError where the file is missing, another than was written, or not of our format."""
    if not path.exists():
        raise ArtifactError(f"{path}: missing; not a model's version folder, or its export did not finish")
    try:
        written = path.with_name(MANIFEST_DIGEST).read_text(errors="replace")
    except OSError as error:
        raise ArtifactError(f"{path.with_name(MANIFEST_DIGEST)}: not readable; no {FORMAT} artifact") from error
    _check_digest(path, written.removesuffix(f"  {MANIFEST}\n"), MANIFEST_DIGEST)
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f"{path}: format is not {FORMAT}")
    return content


def _check_digest(path: Path, expected: str, source: str) -> None:
    try:
        found = digest(path)
    except OSError as error:
        raise ArtifactError(f"{path}: not readable: {error.strerror}") from error
    if found != expected:
        raise ArtifactError(f"{path}: SHA-256 is {found}, {source} says {expected}")


def _check(artifact: Artifact, path: Path) -> None:
    """Raises ArtifactError at the first field that is not what serving relies on."""
    training = artifact.training if isinstance(artifact.training, dict) else {}
    labels, channels = artifact.labels, artifact.image_shape[0]
    files = [name for name in artifact.files if not _is_text(name) or Path(name).name != name or name in ("", "..")]
    rules: dict[str, tuple[object, str, object]] = {
        "files": (files, "names without folders", not files),
        "variants": (
            list(artifact.variants),
            f"{PRECISIONS[0]}, and of {', '.join(PRECISIONS)}",
            PRECISIONS[0] in artifact.variants and set(artifact.variants) <= set(PRECISIONS),
        ),
        "name": (artifact.name, "the name of its folder", artifact.name == path.parent.parent.name),
        "version": (artifact.version, "the name of its folder", artifact.version == path.parent.name),
        "labels": (
            labels,
            "different texts, one at least",
            labels and all(_is_text(label) and label for label in labels) and len(set(labels)) == len(labels),
        ),
        "inputs.images.shape": (
            artifact.image_shape,
            "1 or 3 channels, and a height and a width",
            channels in (1, 3) and all(_is_count(size) for size in artifact.image_shape),
        ),
        "tensorrt.batches": (
            artifact.batches,
            "min, opt and max, each a whole number above 0 and none less than the one before",
            isinstance(artifact.batches, dict)
            and artifact.batches.keys() == {"min", "opt", "max"}
            and all(_is_count(size) for size in artifact.batches.values())
            and artifact.batches["min"] <= artifact.batches["opt"] <= artifact.batches["max"],
        ),
        "outputs.poses.shape[2]": (artifact.pose_size, "a whole number above 0", _is_count(artifact.pose_size)),
        "training.dataset": (training.get("dataset"), "a text", _is_text(training.get("dataset"))),
    }
    for precision, variant in artifact.variants.items():
        errors: Any = variant.get("test_errors")
        images: Any = variant.get("test_images")
        rules[f"variants.{precision}.test_images"] = (images, "a whole number above 0", _is_count(images))
        rules[f"variants.{precision}.test_errors"] = (
            errors,
            "a whole number up to test_images",
            _is_count(images) and (_is_count(errors) or errors == 0) and errors <= images,
        )
    for name, (value, expected, holds) in rules.items():
        if not holds:
            raise ArtifactError(f"{path}: {name} is {value!r}; expected {expected}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**32


def _is_text(value: object) -> bool:
    """A text that a file's name or a message can hold: no null character, and no half of a surrogate pair."""
    return isinstance(value, str) and "\0" not in value and not any("\ud800" <= one <= "\udfff" for one in value)


def find(repository: Path, name: str = "", version: str = "") -> Path:
    """The folder ``<repository>/<name>/<version>``; by default the only model, and its highest version.

    Raises ArtifactError where there is none, or several models and no name, saying which there are.
    """
    models = sorted({path.parent.parent.name for path in repository.glob(f"[!.]*/*/{MANIFEST}")})
    if not models:
        raise ArtifactError(f"{repository}: no model there (expected NAME/VERSION/{MANIFEST})")
    if not name and len(models) > 1:
        raise ArtifactError(f"{repository}: holds several models, choose one: {', '.join(models)}")
    name = name or models[0]
    if name not in models:
        raise ArtifactError(f"{repository}: no model {name!r}; there is: {', '.join(models)}")
    versions = {path.parent.name for path in (repository / name).glob(f"*/{MANIFEST}") if path.parent.name.isdecimal()}
    if not versions or (version and version not in versions):
        known = ", ".join(sorted(versions, key=int)) or "none"
        raise ArtifactError(f"{repository / name}: no version {version or '(a number)'}; there is: {known}")
    return repository / name / (version or max(versions, key=int))
