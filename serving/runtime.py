"""The model in ONNX Runtime: the one place where a batch is computed."""

import importlib
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.artifact import PRECISIONS, Artifact
from serving.files.cache import cache_folder
from serving.tensorrt_options import TENSORRT, execution_provider_options

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
DEVICES = ("auto", "cpu", "cuda", "tensorrt")

#: Of a probability or a component of a pose, in any precision.
_TOLERANCE = 0.01
_CPU_INFO = Path("/proc/cpuinfo")


class RuntimeSetupError(RuntimeError):
    """ONNX Runtime is missing, installed twice, cannot load the model, or lacks the device that was asked for."""


def saturates(cpu_info: Path) -> bool:
    """Whether this x86 processor, as /proc/cpuinfo has it, adds products of 8-bit integers in saturating 16 bits.

    Those without VNNI instructions do, and need ONNX Runtime's precise, slower way, which slows the others down too.
    """
    try:
        flags = next(line for line in cpu_info.read_text().splitlines() if line.startswith("flags")).split()
    except (OSError, StopIteration):  # no Linux, or no x86
        return False
    return not {"avx512_vnni", "avx_vnni"} & set(flags)


class Prediction(NamedTuple):
    """probabilities: (B, J) float32, the poses' lengths; poses: (B, J, E) float32."""

    probabilities: NDArray[np.float32]
    poses: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a batch's prediction that is about one request: of ``batch``, from ``start`` to before ``stop``."""

    batch: Prediction
    start: int
    stop: int

    @property
    def probabilities(self) -> NDArray[np.float32]:
        return self.batch.probabilities[self.start : self.stop]

    @property
    def poses(self) -> NDArray[np.float32]:
        return self.batch.poses[self.start : self.stop]


#: To one request: either has ``probabilities``, (n, J), and ``poses``, (n, J, E).
Answer = Prediction | Share


def onnxruntime() -> Any:
    """Import ONNX Runtime with its telemetry off, which Linux builds since 1.29 have on by default."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    installed = [
        name for name in ("onnxruntime", "onnxruntime-gpu") if next(iter(metadata.distributions(name=name)), None)
    ]
    if len(installed) > 1:
        raise RuntimeSetupError("onnxruntime and onnxruntime-gpu are both installed and overwrite each other; keep one")
    if not installed:
        raise RuntimeSetupError("ONNX Runtime is not installed; install the extra cpu or the extra gpu")
    return importlib.import_module("onnxruntime")


class Runtime:
    """An ONNX Runtime session for one artifact's graph in one precision.

    device: ``auto`` takes CUDA where it works and else the CPU; ``cuda`` and ``tensorrt`` fail where these do not
    work, since ONNX Runtime by itself would fall back to the CPU without a word. threads: for one call, 0 for ONNX
    Runtime's choice. engine_cache: a folder for what TensorRT builds, in which each graph gets one of its own.
    Raises RuntimeSetupError, and ArtifactError where the artifact has no graph in this precision.
    """

    def __init__(
        self,
        artifact: Artifact,
        device: str = "auto",
        threads: int = 0,
        precision: str = PRECISIONS[0],
        engine_cache: Path | None = None,
    ) -> None:
        file = artifact.file(precision)
        ort = onnxruntime()
        self.description = f"ONNX Runtime {ort.__version__}"
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin between calls take the cores from the event loop and from other processes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if precision == "int8" and saturates(_CPU_INFO):
            options.add_session_config_entry("session.x64quantprecision", "1")
        options.log_severity_level = 3
        wanted: list[Any] = [CPU]
        available = ort.get_available_providers()
        if device != "cpu" and CUDA in available:
            ort.preload_dlls()
            wanted = [CUDA, CPU]
        if device == "tensorrt":
            if TENSORRT not in available:
                raise RuntimeSetupError(
                    f"device tensorrt was asked for, but this ONNX Runtime has only {', '.join(available)}; it needs "
                    "the extra gpu and TensorRT's own libraries"
                )
            # By the graph's digest, since TensorRT's cache tells engines apart by names and not by weights.
            cache = (engine_cache or cache_folder() / "tensorrt") / artifact.sha256(precision)
            try:
                cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RuntimeSetupError(
                    f"{cache}: cannot be made: {error.strerror}; engine_cache names another"
                ) from error
            options_of = execution_provider_options(
                artifact.batches, artifact.image_shape, cache, fp16=precision == "fp16"
            )
            wanted = [(TENSORRT, options_of), *wanted]
        # As bytes, what was verified is what runs: a graph in a file could have its weights in others. TensorRT's cache
        # needs the file.
        source = str(file) if device == "tensorrt" else file.read_bytes()
        try:
            self._session = ort.InferenceSession(source, options, providers=wanted)
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise RuntimeSetupError(f"{file}: ONNX Runtime cannot load it: {error}") from error
        #: The provider that ONNX Runtime really uses first, by its own name.
        self.provider: str = self._session.get_providers()[0]
        #: CUDA could have been had by this installation but did not start.
        self.fell_back = len(wanted) > 1 and self.provider == CPU
        needed = {"cuda": CUDA, "tensorrt": TENSORRT}.get(device, self.provider)
        if self.provider != needed:
            raise RuntimeSetupError(f"device {device} was asked for, but ONNX Runtime here runs on {self.provider}")
        try:
            self._test(artifact)
        except RuntimeSetupError:
            raise
        except Exception as error:
            raise RuntimeSetupError(f"{file}: cannot compute two images: {error}") from error

    def _test(self, artifact: Artifact) -> None:
        """Hold the graph to its manifest and to what serving relies on, before any client's image meets it.

        Raises RuntimeSetupError, or whatever ONNX Runtime raises.
        """
        blank = np.zeros(artifact.image_shape, np.uint8)
        noise = np.random.default_rng(0).integers(0, 256, artifact.image_shape, np.uint8)
        answer = self.predict(np.stack([blank, noise]))
        where = f"{artifact.folder}: in its self-test the graph"
        expected = (2, len(artifact.labels), artifact.pose_size)
        if not all(np.isfinite(array).all() for array in answer):
            raise RuntimeSetupError(f"{where} answers with values that are not finite")
        if answer.poses.shape != expected or answer.probabilities.shape != expected[:2]:
            raise RuntimeSetupError(
                f"{where} answers poses {answer.poses.shape} and probabilities "
                f"{answer.probabilities.shape}; its manifest says {expected} and {expected[:2]}"
            )
        lengths = np.linalg.norm(answer.poses, axis=-1)
        if (difference := float(np.abs(lengths - answer.probabilities).max())) > _TOLERANCE:
            raise RuntimeSetupError(
                f"{where} answers probabilities up to {difference:.2g} off the lengths of its poses"
            )
        alone = self.predict(noise[np.newaxis])
        if (difference := float(np.abs(alone.poses[0] - answer.poses[1]).max())) > _TOLERANCE:
            raise RuntimeSetupError(f"{where} answers an image alone and in a batch with poses {difference:.2g} apart")

    def predict(self, images: NDArray[np.uint8]) -> Prediction:
        """uint8 images (B, C, H, W) to probabilities and poses. Blocks; releases Python's lock while it computes."""
        probabilities, poses = self._session.run(["probabilities", "poses"], {"images": images})
        return Prediction(probabilities, poses)
