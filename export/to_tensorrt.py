"""Conversion of an ONNX file to a TensorRT engine.

An engine belongs to the model's weights, to TensorRT's version and to one kind of GPU, so it must be built on the
machine that uses it. That machine needs neither PyTorch nor ``onnx``, and this module imports neither.

This module was never run with a real TensorRT. Its calls follow the source of the Python binding, releases 10.16 and
11.1 (https://github.com/NVIDIA/TensorRT, ``python/src``). The tests use a stand-in.
"""

import importlib
import logging
from pathlib import Path
from typing import Any

from serving.tensorrt_options import BatchProfile

_MIN_MAJOR_VERSION = 10
_INSTALL = (
    "install tensorrt-cu13 (for a driver of CUDA 13; tensorrt-cu12 for one of CUDA 12) from NVIDIA's package index, as "
    "its documentation says, or work in NVIDIA's TensorRT container"
)

_log = logging.getLogger(__name__)


class TensorRTMissing(RuntimeError):
    """TensorRT cannot be used on this machine; the text says what is missing and how to get it."""


class EngineError(RuntimeError):
    """TensorRT cannot build an engine of the model; the text has its reasons, with the names of the nodes."""


def build_engine(
    model_file: Path, engine_file: Path, profile: BatchProfile, timing_cache: Path | None = None, tf32: bool = False
) -> None:
    """Build a TensorRT engine of an ONNX file on this machine's GPU.

    model_file: a graph with one input, (B, C, H, W), with an open batch axis. Every tensor keeps its type (the network
        is strongly typed, as always in TensorRT 11), so half precision depends on the ONNX file.
    engine_file: gets its name when it is complete.
    timing_cache: a file with measured kernel times, which makes the next build faster. It is read if it exists and fits
        this GPU and TensorRT, and replaced afterwards.
    tf32: allow mantissas of 10 bits in products of float32 matrices, as TensorRT does by default. The difference to
        PyTorch was not measured.

    Raises TensorRTMissing; EngineError if the file cannot be parsed, or no engine can be built; OSError if files cannot
    be read or written.
    """
    tensorrt = _tensorrt()
    logger = _logger(tensorrt)
    builder = _builder(tensorrt, logger)
    # TensorRT 11 is always strongly typed and ignores this flag. TensorRT 10 needs it.
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model_file)):
        errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise EngineError(f"{model_file}: TensorRT {tensorrt.__version__} cannot parse it: {'; '.join(errors)}")

    config = builder.create_builder_config()
    if not tf32:
        config.clear_flag(tensorrt.BuilderFlag.TF32)
    _set_profile(builder, network, config, profile, model_file)
    if timing_cache is not None:
        _load_timing_cache(config, timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EngineError(
            f"{model_file}: TensorRT {tensorrt.__version__} cannot build an engine: "
            f"{logger.reasons or 'it gives no reason'}"
        )
    _write(engine_file, engine)
    if timing_cache is not None:
        _write(timing_cache, config.get_timing_cache().serialize())


def _tensorrt() -> Any:
    """Import TensorRT. Raises TensorRTMissing if it is missing, does not load, or is too old."""
    try:
        tensorrt = importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            raise TensorRTMissing(f"the Python package tensorrt lacks {error.name}; {_INSTALL}") from error
        raise TensorRTMissing(
            f"the Python package tensorrt is not installed; it needs Linux or Windows with an NVIDIA GPU: {_INSTALL}"
        ) from error
    except (ImportError, OSError) as error:
        raise TensorRTMissing(
            "the Python package tensorrt is installed, but the libraries that it needs (libnvinfer, libnvonnxparser "
            f"of the same version, NVIDIA's driver) do not load: {error}; {_INSTALL}"
        ) from error
    if int(tensorrt.__version__.partition(".")[0]) < _MIN_MAJOR_VERSION:
        raise TensorRTMissing(
            f"TensorRT {tensorrt.__version__} is installed, and {_MIN_MAJOR_VERSION} or newer is needed: {_INSTALL}"
        )
    return tensorrt


def _logger(tensorrt: Any) -> Any:
    """Return a logger for TensorRT that keeps its messages: its functions return None and give reasons only there."""

    class Logger(tensorrt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        @property
        def reasons(self) -> str:
            # A missing driver is among the warnings.
            return "; ".join(self.errors or self.warnings)

        def log(self, severity: Any, message: str) -> None:
            if severity in (tensorrt.ILogger.Severity.INTERNAL_ERROR, tensorrt.ILogger.Severity.ERROR):
                self.errors.append(message)
            elif severity == tensorrt.ILogger.Severity.WARNING:
                self.warnings.append(message)
                _log.warning(message)

    return Logger()


def _builder(tensorrt: Any, logger: Any) -> Any:
    try:
        return tensorrt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # the binding raises TypeError if the library returns null
        raise TensorRTMissing(
            f"TensorRT {tensorrt.__version__} is installed but does not start: {logger.reasons or error}. It needs an "
            "NVIDIA GPU that this version supports and a driver for its CUDA; nvidia-smi shows both (in a container: "
            "run it with --gpus all)"
        ) from error


def _parser_error(error: Any) -> str:
    node = f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): " if error.node() >= 0 else ""
    return f"{node}{error.code()}: {error.desc()}"


def _set_profile(builder: Any, network: Any, config: Any, profile: BatchProfile, model_file: Path) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    found = [(tensor.name, tuple(tensor.shape)) for tensor in inputs]
    if len(found) != 1 or len(found[0][1]) != 4 or [size < 0 for size in found[0][1]] != [True, False, False, False]:
        raise EngineError(f"{model_file}: its inputs are {found}; expected one, (-1, C, H, W)")
    ((name, (_, *image_shape)),) = found
    optimization = builder.create_optimization_profile()
    optimization.set_shape(name, *profile.shapes(image_shape))
    if config.add_optimization_profile(optimization) < 0:
        raise EngineError(f"{model_file}: TensorRT does not take {profile} for {name}")


def _load_timing_cache(config: Any, file: Path) -> None:
    content = file.read_bytes() if file.exists() else b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        _log.warning("%s: of another GPU or TensorRT, or damaged; it is begun anew", file)
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _write(file: Path, content: Any) -> None:
    """Write TensorRT's memory (a buffer) to a file, under its name only when it is complete."""
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(content)
    partial.replace(file)
