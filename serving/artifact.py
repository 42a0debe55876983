"""Artifact: the folder that export writes and serving reads, its manifest, and its verification.

``<repository>/<name>/<version>/`` holds ``model.onnx``, the network in single precision; further graphs, which the
manifest names; ``manifest.json`` with the digest of each file; and ``manifest.sha256`` with the digest of the manifest,
in the format of ``sha256sum``. The manifest is written last, so a folder without a manifest is an unfinished export.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from serving.files.reading import RefusedFile, opened, read_whole
from serving.tensorrt_options import BatchProfile

FORMAT = "capsnet-artifact-2"
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
MODEL = "model.onnx"
#: The possible precisions of a network. The first one always exists.
PRECISIONS = ("fp32", "int8", "fp16")
#: The largest file of a version by default. ONNX's format has the same limit for a graph.
MAX_FILE_BYTES = 2**31

_FILE_LIMIT = "max_model_bytes"  # the name of the setting, for errors
_MAX_MANIFEST_BYTES = 2**24
_MAX_DIGEST_BYTES = 1024  # of the file with the manifest's digest
_MAX_NAME_CHARACTERS = 128
# The smallest and the largest temperature of a calibration, by which lengths are divided in single precision.
_TEMPERATURES = 1e-6, 1e6
# The highest version has 18 digits, as in a 64-bit number. A leading zero would give a version two names.
_VERSION = re.compile("0|[1-9][0-9]{0,17}")
_MAX_SHOWN_CHARACTERS = 200  # of a value in an error: a client may get it in a header of limited size
_DIFFERENCE_NAME = re.compile("(max|mean)_(.*)_difference")


class ArtifactError(ValueError):
    """A model folder is missing, unfinished, changed or of another format. The text names the file."""


@dataclass(frozen=True)
class Variant:
    """A graph that classifies, in one precision, and the figures of its certificate.

    test_errors, test_images: wrongly classified and all test images; 0 images before the graph is certified.
    images: the number of images in the comparison with ``reference``, in ``runtime`` by ``provider``. Differences are
        absolute.
    tolerance: by figure, the largest accepted value; None for any value.
    rounded: of fp16, the figures of an emulation that rounds the result of each half-precision operation, since
        ``provider`` computes them in single precision.
    double_precision: of fp32, the figures of the images whose difference is beyond the tolerance: their number, and the
        distances of this graph and of PyTorch in single precision from PyTorch in double precision. Empty if there are
        none.
    bytes: the size of the file.
    images_per_second: by batch size, on ``device``.
    weights: the file with weights that the graph refers to by their place in it; empty if it holds all of its own.
    """

    file: str
    reference: str = ""
    runtime: str = ""
    provider: str = ""
    images: int = 0
    max_probability_difference: float = 0.0
    mean_probability_difference: float = 0.0
    max_pose_difference: float = 0.0
    mean_pose_difference: float = 0.0
    labels_changed: int = 0
    test_errors: int = 0
    test_images: int = 0
    tolerance: Mapping[str, float | None] = field(default_factory=dict)
    rounded: Mapping[str, float] = field(default_factory=dict)
    double_precision: Mapping[str, float] = field(default_factory=dict)
    bytes: int = 0
    images_per_second: Mapping[str, float] = field(default_factory=dict)
    device: str = ""
    weights: str = ""

    @property
    def test_error(self) -> str:
        """Return the measured test error as text: ``0.42 % (42 of 10000)``."""
        return f"{100 * self.test_errors / self.test_images:.2f} % ({self.test_errors} of {self.test_images})"


@dataclass(frozen=True)
class ReceptiveField:
    """The pixels that each primary capsule sees, to interpret couplings.

    Capsule ``(type * grid + row) * grid + column`` of ``types * grid * grid`` sees the ``size`` x ``size`` pixels from
    row ``stride * row + offset`` and column ``stride * column + offset``. A negative offset starts in the padding.
    """

    order: str
    types: int
    grid: int
    stride: int
    size: int
    offset: int = 0


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph: its type, such as ``float32``, and its shape without the batch axis."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """A further graph, such as ``explain`` and ``decoder``.

    inputs, outputs: by name; empty in older artifacts.

    images: the number of images in the comparison with PyTorch; None without a comparison. differences and
    mean_differences: by output, the largest and the mean absolute difference. receptive_field: for a graph that returns
    its couplings. weights, double_precision: as of Variant. precision: of the stored weights.
    """

    file: str
    images: int | None = None
    differences: Mapping[str, float] = field(default_factory=dict)
    mean_differences: Mapping[str, float] = field(default_factory=dict)
    receptive_field: ReceptiveField | None = None
    weights: str = ""
    precision: str = PRECISIONS[0]
    double_precision: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)


#: The possible polarities of images: bright objects on a dark ground, the opposite, or either.
POLARITIES = ("bright-on-dark", "dark-on-bright", "")


@dataclass(frozen=True)
class Preparation:
    """The look of the training images, to bring other pictures to it.

    polarity: one of POLARITIES. object_size: the longer side of the object in pixels; 0 if objects may fill the image.
    centred_by_mass: True if the object's centre of mass is in the image's middle, as MNIST's are; False for the middle
    of its box.
    """

    polarity: str = ""
    object_size: int = 0
    centred_by_mass: bool = False


@dataclass(frozen=True)
class Calibration:
    """The figures that say what the lengths of an image's capsules mean, measured at export.

    temperature, objects, arctanh: confidences are ``serving.confidence.confidences`` of ``evidence(lengths, arctanh)``.
        Older artifacts have no ``objects`` and no ``arctanh``: theirs are ``softmax(lengths / temperature)``.
    objects: the number of objects that an image is taken to show, as the training images do.
    arctanh: True if the evidence for a class is the arctanh of its length; False if it is the length.
    presence: by class, the least length of a present class.
    margin: the least difference between the longest and the second longest capsule of an image that is not suspicious.
    reconstruction_error: the largest mean squared error of an image that is not suspicious, with pixels from 0 to 1;
        0 without a decoder.
    false_alarms: the share of the images of known classes that get the verdict SUSPICIOUS or NONE_OF_THESE; in older
        artifacts, the share that margin, and reconstruction_error, each call suspicious.
    images, source: the number and the kind of the images that it was measured on.
    ece: the expected calibration errors on the test images, from 0 to 1: ``length`` of the winner's length,
        ``confidence`` of its confidence, and with several objects ``confidences`` of those of as many longest capsules.
    detected: by kind of images, such as the test images and kinds that show none of the classes, and by finding, the
        share of the images: ``none`` of the classes is present, ``several`` are, one is and the answer is
        ``confident``, or the image is ``suspicious``.
    """

    temperature: float
    presence: tuple[float, ...]
    margin: float
    reconstruction_error: float = 0.0
    false_alarms: float = 0.05
    images: int = 0
    source: str = ""
    objects: int = 1
    arctanh: bool = False
    ece: Mapping[str, float] = field(default_factory=dict)
    detected: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """A training run, and its test data.

    config, recipe and figures: those of the checkpoint, with the names of ``training``.
    """

    dataset: str
    test_data_sha256: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    export_commit: str = ""


@dataclass(frozen=True)
class Artifact:
    """One version of one model. Its files were verified against the manifest.

    image_shape: (C, H, W) of the uint8 input ``images``, (B, C, H, W).
    pose_size: E, of the output ``poses``, (B, J, E); J is the number of labels, and ``probabilities`` is (B, J).
    files: by name, the SHA-256 of each file except the manifest's two, hexadecimal.
    variants: by precision, the graphs that classify.
    graphs: by name, the further graphs, such as ``explain`` and ``decoder``.
    batches: the batch sizes for TensorRT.
    preparation: the look of the training images.
    calibration: None in older artifacts.
    max_file_bytes: the largest file that ``read`` reads.
    """

    folder: Path
    name: str
    version: str
    labels: tuple[str, ...]
    image_shape: tuple[int, int, int]
    pose_size: int
    files: dict[str, str]
    variants: Mapping[str, Variant]
    graphs: Mapping[str, Graph]
    batches: BatchProfile
    training: Training
    preparation: Preparation = Preparation()
    calibration: Calibration | None = None
    max_file_bytes: int = field(default=MAX_FILE_BYTES, compare=False)

    def variant(self, precision: str = PRECISIONS[0]) -> Variant:
        """Return the graph that classifies in this precision. Raises ArtifactError if there is none."""
        if precision not in self.variants:
            known = ", ".join(self.variants)
            raise ArtifactError(f"{self.folder / MANIFEST}: has no graph in {precision}; there is: {known}")
        return self.variants[precision]

    def file(self, precision: str = PRECISIONS[0]) -> Path:
        """Return the file of the graph that classifies in this precision. Raises ArtifactError if there is none."""
        return self.folder / self.variant(precision).file

    def read(self, path: Path) -> bytes:
        """Return the bytes of one of the artifact's files.

        They are compared with the manifest's SHA-256 after they are read, so a file that was changed after ``load`` is
        not used. Raises ArtifactError if they differ, or if the file cannot be read.
        """
        content = _read(path, self.max_file_bytes, _FILE_LIMIT)
        _check_digest(path, hashlib.sha256(content).hexdigest(), self.files[path.name], MANIFEST)
        return content

    def weights(self, graph: Variant | Graph) -> Path | None:
        """Return the file with the weights that a graph refers to, or None if it holds all of its own."""
        return self.folder / graph.weights if graph.weights else None

    def sha256(self, precision: str = PRECISIONS[0]) -> str:
        """Return the SHA-256 of the graph in this precision, hexadecimal."""
        return self.files[self.variant(precision).file]

    def test_error(self, precision: str = PRECISIONS[0]) -> str:
        """Return the measured test error in this precision as text: ``0.42 % (42 of 10000)``."""
        return self.variant(precision).test_error


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest(artifact: Artifact) -> dict[str, Any]:
    """Return the manifest's content for an artifact whose files are written."""
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
        "variants": {precision: _variant_content(variant) for precision, variant in artifact.variants.items()},
        "graphs": {name: _graph_content(graph) for name, graph in artifact.graphs.items()},
        "tensorrt": {"batches": asdict(artifact.batches)},
        **({"preparation": asdict(artifact.preparation)} if artifact.preparation != Preparation() else {}),
        **({"calibration": _calibration_content(artifact.calibration)} if artifact.calibration else {}),
        "training": asdict(artifact.training),
    }


def _variant_content(variant: Variant) -> dict[str, Any]:
    content = asdict(variant)
    for name in ("rounded", "double_precision", "weights"):
        if not content[name]:
            del content[name]
    return content


def _calibration_content(calibration: Calibration) -> dict[str, Any]:
    return {**asdict(calibration), "presence": list(calibration.presence)}


def _graph_content(graph: Graph) -> dict[str, Any]:
    content: dict[str, Any] = {"file": graph.file}
    if graph.images is not None:
        content["images"] = graph.images
    for kind, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        if tensors:
            content[kind] = {
                name: {"dtype": tensor.dtype, "shape": [None, *tensor.shape]} for name, tensor in tensors.items()
            }
    content |= {f"max_{output}_difference": value for output, value in graph.differences.items()}
    content |= {f"mean_{output}_difference": value for output, value in graph.mean_differences.items()}
    if graph.double_precision:
        content["double_precision"] = dict(graph.double_precision)
    if graph.weights:
        content["weights"] = graph.weights
    if graph.precision != PRECISIONS[0]:
        content["precision"] = graph.precision
    if graph.receptive_field:
        seen = asdict(graph.receptive_field)
        if not graph.receptive_field.offset:  # older manifests, without padding, have no offset
            del seen["offset"]
        content["receptive_field"] = seen
    return content


def write_manifest(artifact: Artifact) -> None:
    """Write ``manifest.sha256`` and then ``manifest.json``, which gets its name when it is complete."""
    content = (json.dumps(manifest(artifact), indent=2) + "\n").encode()
    (artifact.folder / MANIFEST_DIGEST).write_text(f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n")
    partial = artifact.folder / (MANIFEST + ".partial")
    partial.write_bytes(content)
    partial.replace(artifact.folder / MANIFEST)


def is_name(text: str) -> bool:
    """Return True for the name of a model: printable characters, 128 at most, that do not begin with a dot."""
    return text.isprintable() and not text.startswith(".") and 0 < len(text) <= _MAX_NAME_CHARACTERS


def is_version(text: str) -> bool:
    """Return True for the name of a version: a whole number without leading zeros, of 18 digits at most."""
    return bool(_VERSION.fullmatch(text))


def load(folder: Path, max_file_bytes: int = MAX_FILE_BYTES) -> Artifact:
    """Read and verify one version's folder.

    Raises ArtifactError with the file's name if the manifest is missing, is not JSON or has another format, if a field
    is missing or wrong, or if a file has another SHA-256 than in the manifest, has more than ``max_file_bytes`` bytes,
    is no regular file, or is a link to a place outside the repository. Unknown fields are ignored.
    """
    path = folder / MANIFEST
    content = _Section(path, "", _read_manifest(path))
    files = _files(content)
    result = Artifact(
        folder=folder,
        name=content.exactly("name", folder.parent.name, "the name of its folder"),
        version=content.exactly("version", folder.name, "the name of its folder"),
        labels=_labels(content),
        image_shape=_image_shape(content),
        pose_size=_pose_size(content),
        files=files,
        variants=_variants(content),
        graphs={name: _graph(section) for name, section in content.sections("graphs").items()},
        batches=_batches(content),
        training=_training(content.section("training")),
        preparation=_preparation(content.section("preparation", {})),
        calibration=_calibration(content) if "calibration" in content.content else None,
        max_file_bytes=max_file_bytes,
    )
    graphs: list[Variant | Graph] = [*result.variants.values(), *result.graphs.values()]
    named_files = {graph.file for graph in graphs} | {graph.weights for graph in graphs if graph.weights}
    if unknown := named_files - files.keys():
        raise ArtifactError(f"{path}: files has no digest of {', '.join(sorted(unknown))}")
    for name, sha256 in files.items():
        _check_digest(folder / name, _digest(folder / name, max_file_bytes), sha256, MANIFEST)
    return result


def files_named_by(manifest_file: Path) -> list[str]:
    """Return the names of a manifest's files, or none if it cannot be read."""
    try:
        content = json.loads(_read(manifest_file, _MAX_MANIFEST_BYTES))
        return [name for name in content["files"] if Path(name).name == name]
    except (ValueError, TypeError, KeyError, RecursionError):  # ArtifactError is a ValueError
        return []


class _Section:
    """A JSON object of the manifest, read field by field. Each error names the field by its path from the top.

    Every method raises ArtifactError where the field is missing, without a default, or of another type.
    """

    def __init__(self, path: Path, name: str, content: object) -> None:
        """Wrap an object. path: the manifest. name: the section's name and a dot, or "" for the whole manifest."""
        self._path = path
        self._name = name
        if not isinstance(content, dict):
            raise ArtifactError(f"{path}: {name.removesuffix('.')} is {_shown(content)}; expected an object")
        self.content: dict[str, object] = content

    def error(self, field: str, value: object, expected: str) -> ArtifactError:
        return ArtifactError(f"{self._path}: {self._name}{field} is {_shown(value)}; expected {expected}")

    def section(self, field: str, default: object = None) -> "_Section":
        return _Section(self._path, f"{self._name}{field}.", self.content.get(field, default))

    def sections(self, field: str) -> dict[str, "_Section"]:
        section = self.section(field)
        return {name: section.section(name) for name in section.content}

    def text(self, field: str, default: object = None) -> str:
        value = self.content.get(field, default)
        if not _is_text(value):
            raise self.error(field, value, "a text")
        return value

    def exactly(self, field: str, wanted: str, expected: str) -> str:
        if (value := self.content.get(field)) != wanted:
            raise self.error(field, value, expected)
        return wanted

    def count(self, field: str, default: object = None) -> int:
        value = self.content.get(field, default)
        if not _is_count(value):
            raise self.error(field, value, "a whole number above 0")
        return value

    def count_or_zero(self, field: str, default: object = None) -> int:
        value = self.content.get(field, default)
        if value == 0 and type(value) is int:
            return 0
        return self.count(field, default)

    def number(self, field: str, default: object = None) -> float:
        value = self.content.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(field, value, "a number")
        return value

    def share(self, field: str, default: object = None) -> float:
        if not _is_share(value := self.content.get(field, default)):
            raise self.error(field, value, "a number from 0 to 1")
        return value

    def truth(self, field: str, default: bool) -> bool:
        if not isinstance(value := self.content.get(field, default), bool):
            raise self.error(field, value, "true or false")
        return value

    def shape(self, field: str, axes: int) -> list[object]:
        """Return the unchecked sizes after the batch axis of a tensor with this number of axes."""
        value = self.section(field).content.get("shape")
        if not isinstance(value, list) or len(value) != axes:
            raise self.error(f"{field}.shape", value, f"a list of {axes} sizes")
        return value[1:]


def _files(content: _Section) -> dict[str, str]:
    """Return the SHA-256 of each file by its name."""
    files = content.sections("files")
    if wrong := [name for name in files if not _is_text(name) or Path(name).name != name or name in ("", "..")]:
        raise content.error("files", wrong, "names without folders")
    return {name: file.text("sha256") for name, file in files.items()}


def _labels(content: _Section) -> tuple[str, ...]:
    found = content.content.get("labels")
    labels = tuple(found) if isinstance(found, list) else ()
    if not labels or not all(_is_text(label) and label for label in labels) or len(set(labels)) != len(labels):
        raise content.error("labels", labels, "different texts, one at least")
    return labels


def _image_shape(content: _Section) -> tuple[int, int, int]:
    shape = tuple(content.section("inputs").shape("images", 4))
    channels, height, width = shape
    if _is_count(channels) and channels in (1, 3) and _is_count(height) and _is_count(width):
        return channels, height, width
    raise content.error("inputs.images.shape", shape, "1 or 3 channels, and a height and a width")


def _pose_size(content: _Section) -> int:
    size = content.section("outputs").shape("poses", 3)[1]
    if not _is_count(size):
        raise content.error("outputs.poses.shape[2]", size, "a whole number above 0")
    return size


def _variants(content: _Section) -> dict[str, Variant]:
    variants = content.sections("variants")
    if PRECISIONS[0] not in variants or not set(variants) <= set(PRECISIONS):
        raise content.error("variants", list(variants), f"{PRECISIONS[0]}, and of {', '.join(PRECISIONS)}")
    return {precision: _variant(section) for precision, section in variants.items()}


def _variant(section: _Section) -> Variant:
    images = section.count("test_images")
    errors = section.content.get("test_errors")
    if not (_is_count(errors) or (errors == 0 and type(errors) is int)) or errors > images:
        raise section.error("test_errors", errors, "a whole number up to test_images")
    tolerance = section.section("tolerance", {})
    rounded = section.section("rounded", {})
    double = section.section("double_precision", {})
    speeds = section.section("images_per_second", {})
    return Variant(
        file=section.text("file"),
        reference=section.text("reference", ""),
        runtime=section.text("runtime", ""),
        provider=section.text("provider", ""),
        images=section.count_or_zero("images", 0),
        max_probability_difference=section.number("max_probability_difference", 0.0),
        mean_probability_difference=section.number("mean_probability_difference", 0.0),
        max_pose_difference=section.number("max_pose_difference", 0.0),
        mean_pose_difference=section.number("mean_pose_difference", 0.0),
        labels_changed=section.count_or_zero("labels_changed", 0),
        test_errors=errors,
        test_images=images,
        tolerance={
            name: None if value is None else tolerance.number(name) for name, value in tolerance.content.items()
        },
        rounded={name: rounded.number(name) for name in rounded.content},
        double_precision={name: double.number(name) for name in double.content},
        bytes=section.count_or_zero("bytes", 0),
        images_per_second={batch: speeds.number(batch) for batch in speeds.content},
        device=section.text("device", ""),
        weights=section.text("weights", ""),
    )


def _graph(section: _Section) -> Graph:
    double = section.section("double_precision", {})
    found = {name: match for name in section.content if (match := _DIFFERENCE_NAME.fullmatch(name))}
    largest, mean = (
        {match[2]: section.number(name) for name, match in found.items() if match[1] == kind}
        for kind in ("max", "mean")
    )
    return Graph(
        file=section.text("file"),
        images=section.count("images") if "images" in section.content else None,
        differences=largest,
        mean_differences=mean,
        receptive_field=_receptive_field(section) if "receptive_field" in section.content else None,
        weights=section.text("weights", ""),
        precision=section.text("precision", PRECISIONS[0]),
        double_precision={name: double.number(name) for name in double.content},
        inputs=_tensors(section, "inputs"),
        outputs=_tensors(section, "outputs"),
    )


def _tensors(graph: _Section, field: str) -> dict[str, Tensor]:
    sections = graph.sections(field) if field in graph.content else {}
    return {name: _tensor(section) for name, section in sections.items()}


def _tensor(section: _Section) -> Tensor:
    shape = section.content.get("shape")
    if not isinstance(shape, list) or len(shape) == 0 or not all(map(_is_count, shape[1:])):
        raise section.error("shape", shape, "a list of the batch axis and whole numbers above 0")
    return Tensor(section.text("dtype"), tuple(shape[1:]))


def _receptive_field(graph: _Section) -> ReceptiveField:
    section = graph.section("receptive_field")
    offset = section.content.get("offset", 0)
    if type(offset) is not int or abs(offset) >= 2**31:
        raise section.error("offset", offset, "a whole number of at most 31 bits")
    return ReceptiveField(
        order=section.text("order"),
        types=section.count("types"),
        grid=section.count("grid"),
        stride=section.count("stride"),
        size=section.count("size"),
        offset=offset,
    )


def _batches(content: _Section) -> BatchProfile:
    section = content.section("tensorrt")
    found = section.content.get("batches")
    if isinstance(found, dict) and found.keys() == {"min", "opt", "max"} and all(map(_is_count, found.values())):
        with suppress(ValueError):
            return BatchProfile(**found)
    expected = "min, opt and max, each a whole number above 0 and none less than the one before"
    raise section.error("batches", found, expected)


def _preparation(section: _Section) -> Preparation:
    polarity = section.text("polarity", "")
    if polarity not in POLARITIES:
        raise section.error("polarity", polarity, " or ".join(map(repr, POLARITIES)))
    by_mass = section.truth("centred_by_mass", False)
    return Preparation(polarity, section.count_or_zero("object_size", 0), by_mass)


def _calibration(content: _Section) -> Calibration:
    section, classes = content.section("calibration"), len(_labels(content))
    presence = section.content.get("presence")
    if not isinstance(presence, list) or len(presence) != classes or not all(map(_is_share, presence)):
        raise section.error("presence", presence, f"{classes} numbers from 0 to 1")
    low, high = _TEMPERATURES
    if not low <= (temperature := section.number("temperature")) <= high:
        raise section.error("temperature", temperature, f"a number from {low:g} to {high:g}")
    objects = section.count("objects", 1)
    if objects > classes:
        raise section.error("objects", objects, f"a whole number up to the number of classes, {classes}")
    detected = section.section("detected", {})
    ece = section.section("ece", {})
    return Calibration(
        temperature=temperature,
        presence=tuple(presence),
        margin=section.share("margin"),
        reconstruction_error=section.share("reconstruction_error", 0.0),
        false_alarms=section.share("false_alarms"),
        images=section.count_or_zero("images", 0),
        source=section.text("source", ""),
        objects=objects,
        arctanh=section.truth("arctanh", False),
        ece={name: ece.share(name) for name in ece.content},
        detected={
            name: {finding: kind.share(finding) for finding in kind.content}
            for name, kind in ((name, detected.section(name)) for name in detected.content)
        },
    )


def _training(section: _Section) -> Training:
    return Training(
        dataset=section.text("dataset"),
        test_data_sha256=section.text("test_data_sha256", ""),
        config=section.section("config", {}).content,
        recipe=section.section("recipe", {}).content,
        figures=section.section("figures", {}).content,
        export_commit=section.text("export_commit", ""),
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest's content.

    Raises ArtifactError if the file is missing, was changed, or has another format.
    """
    if not path.exists():
        raise ArtifactError(f"{path}: missing; not a model's version folder, or its export did not finish")
    beside = path.with_name(MANIFEST_DIGEST)
    try:
        written = _read(beside, _MAX_DIGEST_BYTES).decode(errors="replace")
    except ArtifactError as error:
        raise ArtifactError(f"{error}; no {FORMAT} artifact") from error
    text = _read(path, _MAX_MANIFEST_BYTES)
    expected = written.removesuffix(f"  {MANIFEST}\n")
    _check_digest(path, hashlib.sha256(text).hexdigest(), expected[:_MAX_SHOWN_CHARACTERS], MANIFEST_DIGEST)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f"{path}: format is not {FORMAT}")
    return content


def _read(path: Path, max_bytes: int, setting: str = "") -> bytes:
    """Return the bytes of a file of a version's folder. Raises ArtifactError."""
    try:
        return read_whole(path, _repository_of(path), max_bytes, setting)
    except (OSError, RefusedFile) as error:
        raise _not_readable(path, error) from error


def _digest(path: Path, max_bytes: int) -> str:
    """Return the SHA-256 of a file of a version's folder, hexadecimal. Raises ArtifactError."""
    try:
        with opened(path, _repository_of(path), max_bytes, _FILE_LIMIT) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, RefusedFile) as error:
        raise _not_readable(path, error) from error


def _repository_of(path: Path) -> Path:
    """Return the repository that a version's file belongs to."""
    return path.absolute().parent.parent.parent


def _not_readable(path: Path, error: OSError | RefusedFile) -> ArtifactError:
    return ArtifactError(f"{path}: not readable: {error.strerror if isinstance(error, OSError) else error}")


def _check_digest(path: Path, found: str, expected: str, source: str) -> None:
    if found != expected:
        raise ArtifactError(f"{path}: SHA-256 is {found}, {source} says {expected}")


def _shown(value: object) -> str:
    """Return a value as text for an error."""
    return repr(value)[:_MAX_SHOWN_CHARACTERS]


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**32


def _is_share(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_text(value: object) -> TypeGuard[str]:
    """Return True for a text that a file's name, a message and a line of the log can hold."""
    return isinstance(value, str) and value.isprintable()


def find(repository: Path, name: str = "", version: str = "") -> Path:
    """Return the folder ``<repository>/<name>/<version>``. The default is the only model, and its highest version.

    Raises ArtifactError if there is none, or if there are several models and no name. The text names the models.
    """
    models = names(repository)
    if not models:
        if (repository / "capsnet.pt").exists():
            raise ArtifactError(f"{repository}: a run of the training; its export writes the model (docs/training.md)")
        raise ArtifactError(f"{repository}: no model there (expected NAME/VERSION/{MANIFEST})")
    if not name and len(models) > 1:
        raise ArtifactError(f"{repository}: holds several models, choose one: {', '.join(models)}")
    name = name or models[0]
    if name not in models:
        raise ArtifactError(f"{repository}: no model {name!r}; there is: {', '.join(models)}")
    found = versions(repository, name)
    if not found or (version and version not in found):
        known = ", ".join(reversed(found)) or "none"
        raise ArtifactError(f"{repository / name}: no version {version or '(a number)'}; there is: {known}")
    return repository / name / (version or found[0])


def names(repository: Path) -> list[str]:
    """Return the names of a repository's models. Folders with other names than ``is_name`` accepts are none."""
    return sorted(filter(is_name, _folders(repository)))


def unusable_names(repository: Path) -> list[str]:
    """Return the names of folders that would be models if ``is_name`` accepted their names."""
    return sorted(name for name in _folders(repository) if not is_name(name))


def versions(repository: Path, name: str) -> list[str]:
    """Return the versions of a repository's model, the highest first."""
    found = {path.parent.name for path in (repository / name).glob(f"*/{MANIFEST}")}
    return sorted(filter(is_version, found), key=int, reverse=True)


def _folders(repository: Path) -> set[str]:
    return {path.parent.parent.name for path in repository.glob(f"[!.]*/*/{MANIFEST}")}
