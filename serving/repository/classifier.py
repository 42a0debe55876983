"""The graph that classifies: its opening, its test before it serves, and the check of its answers."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serving.artifact import Artifact
from serving.batching.batch import Hooks
from serving.files.cache import cache_folder
from serving.metrics.registry import CLASSIFY, ModelMetrics
from serving.repository.findings import Findings
from serving.repository.served_graph import all_finite
from serving.runtime import Arrays, Runtime, RuntimeSetupError, TensorRtSetup
from serving.settings import Settings
from serving.tensorrt_options import execution_provider_options

IMAGES, PROBABILITIES, POSES = "images", "probabilities", "poses"
#: The largest allowed difference of a probability or of a component of a pose, in any precision.
_TOLERANCE = 0.01


class Classifier:
    """The classifying graph, which every model has, in the precision of the settings.

    Its answers must be finite. They get the findings of the calibration, and go into the quality figures.
    """

    name = CLASSIFY

    def __init__(self, artifact: Artifact, settings: Settings) -> None:
        self.labels = artifact.labels
        self.max_batch = artifact.batches.max if settings.device == "tensorrt" else 0
        self._artifact = artifact
        self._settings = settings
        self._findings = Findings(artifact.calibration, len(artifact.labels)) if artifact.calibration else None

    def open(self, threads: int) -> Runtime:
        settings = self._settings
        cache = Path(settings.engine_cache) if settings.engine_cache else None
        return open_classifier(self._artifact, settings.device, threads, settings.precision, cache)

    def hooks(self, metrics: ModelMetrics) -> Hooks:
        def observe(outputs: Arrays) -> None:
            metrics.quality.add(np.asarray(outputs[PROBABILITIES], np.float32))

        findings = self._findings
        if findings is None:
            return Hooks(finite_rows, observe=observe)
        return Hooks(finite_rows, lambda inputs, outputs: findings(inputs[IMAGES], outputs[PROBABILITIES]), observe)


def open_classifier(
    artifact: Artifact, device: str, threads: int, precision: str, engine_cache: Path | None = None
) -> Runtime:
    """Open the artifact's graph in this precision, and test it.

    engine_cache: a folder for TensorRT's engines, with a sub-folder for each graph. Raises RuntimeSetupError, or
    ArtifactError if the artifact has no graph in this precision.
    """
    file = artifact.file(precision)
    tensorrt = None
    if device == "tensorrt":
        profile = artifact.batches
        # Named by the graph's digest, since TensorRT's cache distinguishes engines by names and not by weights.
        tensorrt = TensorRtSetup(
            (engine_cache or cache_folder() / "tensorrt") / artifact.sha256(precision),
            lambda folder: execution_provider_options(profile, artifact.image_shape, folder, fp16=precision == "fp16"),
        )
    weights = artifact.weights(artifact.variant(precision))
    runtime = Runtime(file, device, threads, precision == "int8", tensorrt, weights, artifact.read)
    try:
        self_test(runtime, artifact)
    except RuntimeSetupError:
        raise
    except Exception as error:
        raise RuntimeSetupError(f"{file}: cannot compute two images: {error}") from error
    return runtime


def self_test(runtime: Runtime, artifact: Artifact) -> None:
    """Test the graph against its manifest and the requirements of serving, before it gets a client's image.

    Raises RuntimeSetupError, or any error of ONNX Runtime.
    """
    blank = np.zeros(artifact.image_shape, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, artifact.image_shape, np.uint8)
    probabilities, poses = _predict(runtime, np.stack([blank, noise]))
    where = f"{artifact.folder}: in its self-test the graph"
    expected = (2, len(artifact.labels), artifact.pose_size)
    if not (np.isfinite(probabilities).all() and np.isfinite(poses).all()):
        raise RuntimeSetupError(f"{where} answers with values that are not finite")
    if poses.shape != expected or probabilities.shape != expected[:2]:
        raise RuntimeSetupError(
            f"{where} answers poses {poses.shape} and probabilities {probabilities.shape}; "
            f"its manifest says {expected} and {expected[:2]}"
        )
    lengths = np.linalg.norm(poses, axis=-1)
    if (difference := float(np.abs(lengths - probabilities).max())) > _TOLERANCE:
        raise RuntimeSetupError(f"{where} answers probabilities up to {difference:.2g} off the lengths of its poses")
    _, alone = _predict(runtime, noise[np.newaxis])
    if (difference := float(np.abs(alone[0] - poses[1]).max())) > _TOLERANCE:
        raise RuntimeSetupError(f"{where} answers an image alone and in a batch with poses {difference:.2g} apart")


def finite_rows(outputs: Arrays) -> NDArray[np.bool_] | None:
    """Return True for each image with a finite answer, (B,), or None if all are finite.

    Raises ValueError if the shapes are not those of probabilities (B, J) and poses (B, J, E).
    """
    probabilities, poses = outputs[PROBABILITIES], outputs[POSES]
    shape = probabilities.shape
    if len(shape) != 2 or poses.shape[:-1] != shape:
        raise ValueError(f"images were answered with probabilities {shape} and poses {poses.shape}")
    return all_finite(outputs)


def _predict(runtime: Runtime, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    outputs = runtime.run({IMAGES: images})
    return np.asarray(outputs[PROBABILITIES], np.float32), np.asarray(outputs[POSES], np.float32)
