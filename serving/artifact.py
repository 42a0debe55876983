"""The artifact: the folder that passes from export to serving, its manifest, and its verification.

``<repository>/<name>/<version>/`` holds ``model.onnx`` and ``manifest.json``. The manifest is written last, so a
folder without one is an export that did not finish.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = "capsnet-artifact-1"
MANIFEST = "manifest.json"
MODEL = "model.onnx"


class ArtifactError(ValueError):
    """A model folder that is missing, unfinished, changed or of another format; the text names the file."""


@dataclass(frozen=True)
class Artifact:
    """One version of one model, its files verified against the manifest.

    image_shape: (C, H, W) of the uint8 input ``images``, (B, C, H, W).
    pose_size: E, of the output ``poses``, (B, J, E); J is the number of labels, and ``probabilities`` is (B, J).
    sha256: of the model file, hexadecimal.
    training: dataset, config, recipe and figures of the training run; parity: the export's comparison with PyTorch.
    """

    folder: Path
    name: str
    version: str
    labels: tuple[str, ...]
    image_shape: tuple[int, int, int]
    pose_size: int
    sha256: str
    training: dict[str, Any]
    parity: dict[str, Any]

    @property
    def model_file(self) -> Path:
        return self.folder / MODEL

    @property
    def test_error(self) -> str:
        """The measured test error, for people: ``0.42 % (42 of 10000)``."""
        figures = self.training["figures"]
        errors, images = figures["test_errors"], figures["test_images"]
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
        "files": {MODEL: {"sha256": artifact.sha256, "bytes": artifact.model_file.stat().st_size}},
        "training": artifact.training,
        "parity": artifact.parity,
    }


def write_manifest(artifact: Artifact) -> None:
    """Write ``manifest.json``, under its name only once it is whole."""
    partial = artifact.folder / (MANIFEST + ".partial")
    partial.write_text(json.dumps(manifest(artifact), indent=2) + "\n")
    partial.replace(artifact.folder / MANIFEST)


def load(folder: Path) -> Artifact:
    """Read and verify one version's folder.

    Raises ArtifactError naming the file: no manifest, not JSON, another format, a field missing, or a model file
    whose SHA-256 is not the manifest's.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing; not a model's version folder, or its export did not finish") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f"{path}: format is not {FORMAT}")
    try:
        _, channels, height, width = content["inputs"]["images"]["shape"]
        result = Artifact(
            folder=folder,
            name=content["name"],
            version=content["version"],
            labels=tuple(content["labels"]),
            image_shape=(channels, height, width),
            pose_size=content["outputs"]["poses"]["shape"][2],
            sha256=content["files"][MODEL]["sha256"],
            training=content["training"],
            parity=content["parity"],
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ArtifactError(f"{path}: a field is missing or malformed ({error!r})") from error
    _check(result, path)
    try:
        found = digest(result.model_file)
    except OSError as error:
        raise ArtifactError(f"{result.model_file}: not readable: {error.strerror}") from error
    if found != result.sha256:
        raise ArtifactError(f"{result.model_file}: SHA-256 is {found}, the manifest says {result.sha256}")
    return result


def _check(artifact: Artifact, path: Path) -> None:
    """Raises ArtifactError at the first field that is not what serving relies on."""
    training = artifact.training if isinstance(artifact.training, dict) else {}
    figures = training.get("figures")
    figures = figures if isinstance(figures, dict) else {}
    errors, images = figures.get("test_errors"), figures.get("test_images")
    labels, channels = artifact.labels, artifact.image_shape[0]
    rules = {
        "name": (artifact.name, "the name of its folder", artifact.name == path.parent.parent.name),
        "version": (artifact.version, "the name of its folder", artifact.version == path.parent.name),
        "labels": (
            labels,
            "different texts, one at least",
            labels and all(isinstance(label, str) and label for label in labels) and len(set(labels)) == len(labels),
        ),
        "inputs.images.shape": (
            artifact.image_shape,
            "1 or 3 channels, and a height and a width",
            channels in (1, 3) and all(_is_count(size) for size in artifact.image_shape),
        ),
        "outputs.poses.shape[2]": (artifact.pose_size, "a whole number above 0", _is_count(artifact.pose_size)),
        "training.dataset": (training.get("dataset"), "a text", isinstance(training.get("dataset"), str)),
        "training.figures.test_images": (images, "a whole number above 0", _is_count(images)),
        "training.figures.test_errors": (
            errors,
            "a whole number up to test_images",
            isinstance(errors, int) and isinstance(images, int) and 0 <= errors <= images,
        ),
    }
    for name, (value, expected, holds) in rules.items():
        if not holds:
            raise ArtifactError(f"{path}: {name} is {value!r}; expected {expected}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def find(repository: Path, name: str = "", version: str = "") -> Path:
    """The folder ``<repository>/<name>/<version>``; by default the only model, and its highest version.

    Raises ArtifactError where there is none, or several models and no name, saying which there are.
    """
    models = sorted({path.parent.parent.name for path in repository.glob(f"*/*/{MANIFEST}")})
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
