"""ONNX Runtime: computation of a batch of any graph."""

import ctypes
import importlib
import os
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from serving.fixed_batches import FixedBatches, Session
from serving.tensorrt_options import TENSORRT

Array = NDArray[np.generic]
#: Arrays by name, all with the same number of rows: the first axis is the batch.
Arrays = Mapping[str, Array]
#: Computes a graph's outputs from its inputs. Blocks.
Run = Callable[[Arrays], Arrays]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
DEVICES = ("auto", "cpu", "cuda", "tensorrt")

#: ONNX Runtime's names of element types, and NumPy's names.
_DTYPES = {
    "tensor(bool)": "bool",
    "tensor(double)": "float64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
}
# Of glibc's malloc.h: the names of three options of mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# The free memory at the end of the heap that glibc keeps. With less, a TLS record of a byte takes ten times as long:
# uvloop reads it into a block of 256 KiB, which the system would have to give and take back.
_KEPT_BYTES = 2**22
_MAX_ARENAS = 2  # with a single one all threads wait for its lock
_CPU_INFO_FILE = Path("/proc/cpuinfo")


class RuntimeSetupError(RuntimeError):
    """ONNX Runtime is missing or installed twice, cannot load the model, or lacks the requested device."""


def saturates(cpu_info: Path) -> bool:
    """Return True if this x86 processor adds products of 8-bit integers in 16 bits that saturate.

    Processors without VNNI instructions do so. They need ONNX Runtime's precise mode, which is slower; other processors
    do not need it. cpu_info: a file like /proc/cpuinfo.
    """
    try:
        flags = next(line for line in cpu_info.read_text().splitlines() if line.startswith("flags")).split()
    except (OSError, StopIteration):  # no Linux, or no x86
        return False
    return not {"avx512_vnni", "avx_vnni"} & set(flags)


def usable_cores() -> int:
    """Return the number of cores that this process may use, by its affinity and its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no control groups, or no quota ("max")
        return cores


def return_free_memory() -> None:
    """Return the memory that closed sessions have freed to the system, where the C library can do so.

    glibc keeps it for each thread that has allocated, and a session's parts come from many.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def keep_little_free_memory(min_bytes: int) -> None:
    """Make the C library return freed blocks of ``min_bytes`` and more to the system at once, if it is glibc.

    Otherwise glibc keeps blocks for reuse, the more the larger they are, and for up to eight threads a core. Call it
    before the threads start.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option:
        option(_M_MMAP_THRESHOLD, min_bytes)
        option(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        option(_M_ARENA_MAX, _MAX_ARENAS)


class TensorSpec(NamedTuple):
    """An input or output of a graph: element type, and the shape of one row with None for a free axis."""

    dtype: "np.dtype[np.generic]"
    shape: tuple[int | None, ...]


class TensorRtSetup(NamedTuple):
    """The setup of TensorRT for one graph.

    cache: the folder for the built engine. options: returns the provider's options for this folder.
    """

    cache: Path
    options: Callable[[Path], dict[str, str]]


def rows(arrays: Arrays) -> int:
    """Return the number of rows, the same in each array."""
    return len(next(iter(arrays.values())))


def example(inputs: Mapping[str, TensorSpec], count: int, generator: np.random.Generator) -> dict[str, Array]:
    """Return inputs of ``count`` rows: random bytes, random floats from 0 to 1, and zeros for other types.

    Other whole numbers may be indices, so only 0 is safe. A free axis gets the length 1.
    """
    arrays: dict[str, Array] = {}
    for name, (dtype, shape) in inputs.items():
        size = (count, *(length or 1 for length in shape))
        if dtype == np.uint8:
            arrays[name] = generator.integers(0, 256, size, np.uint8)
        elif np.issubdtype(dtype, np.floating):
            arrays[name] = generator.random(size, np.float32).astype(dtype)
        else:
            arrays[name] = np.zeros(size, dtype)
    return arrays


def onnxruntime() -> Any:
    """Import ONNX Runtime with its telemetry off. Linux builds have it on by default since 1.29.

    Raises RuntimeSetupError if it is missing or installed twice.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    installed = [
        name for name in ("onnxruntime", "onnxruntime-gpu") if next(iter(metadata.distributions(name=name)), None)
    ]
    if len(installed) > 1:
        raise RuntimeSetupError("onnxruntime and onnxruntime-gpu are both installed and overwrite each other; keep one")
    if not installed:
        raise RuntimeSetupError("ONNX Runtime is not installed; install the extra cpu or the extra gpu")
    return importlib.import_module("onnxruntime")


class _Tensor(Protocol):
    """An input or output as ONNX Runtime describes it, with a number or a name for each axis."""

    name: str
    type: str
    shape: list[int | str | None]


class _Session(Session, Protocol):
    """The used part of ``onnxruntime.InferenceSession``."""

    def get_providers(self) -> list[str]: ...
    def get_inputs(self) -> list[_Tensor]: ...
    def get_outputs(self) -> list[_Tensor]: ...


class Runtime:
    """An ONNX Runtime session for one graph file.

    device: ``auto`` uses CUDA if it works, else the CPU. ``cuda`` and ``tensorrt`` fail if these do not work: ONNX
        Runtime alone would fall back silently to the CPU.
    threads: the threads of one call; 0 for ONNX Runtime's choice.
    quantized: True if the graph multiplies 8-bit integers. Otherwise weights in 8 bits become single precision here.
    weights: the file with weights that the graph refers to by their place in it; no other file is read.
    tensorrt: required for the device ``tensorrt`` and unused otherwise.
    read: returns the bytes of these files, perhaps after a check of their digest. Each is read once, and ONNX Runtime
        gets exactly these bytes.

    Raises RuntimeSetupError, and any error of ``read``.
    """

    def __init__(
        self,
        file: Path,
        device: str = "auto",
        threads: int = 0,
        quantized: bool = False,
        tensorrt: TensorRtSetup | None = None,
        weights: Path | None = None,
        read: Callable[[Path], bytes] = Path.read_bytes,
    ) -> None:
        ort = onnxruntime()
        self.description = f"ONNX Runtime {ort.__version__}"
        providers = _providers(ort, device, tensorrt)
        referred = weights or file
        contents = {path: read(path) for path in {file, referred}}
        shared = contents[referred]
        source: str | bytes = contents[file]
        if tensorrt and device == "tensorrt":
            source = _copy_of(file, contents, tensorrt.cache)

        def open_session() -> _Session:
            options = _session_options(ort, threads, quantized)
            if device != "tensorrt":
                # ONNX Runtime copies weights from the bytes when it makes the session. It refuses references to other
                # files than this one; without it, it would look for them in the current folder.
                options.add_external_initializers_from_files_in_memory([referred.name], [shared], [len(shared)])
            session: _Session = ort.InferenceSession(source, options, providers=providers)
            return session

        try:
            session = open_session()
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise RuntimeSetupError(f"{file}: ONNX Runtime cannot load it: {error}") from error
        #: ONNX Runtime's name of the provider that it really uses first.
        self.provider: str = session.get_providers()[0]
        #: True if CUDA is installed and was allowed, but did not start.
        self.fell_back = len(providers) > 1 and self.provider == CPU
        needed = {"cuda": CUDA, "tensorrt": TENSORRT}.get(device, self.provider)
        if self.provider != needed:
            raise RuntimeSetupError(f"device {device} was asked for, but ONNX Runtime here runs on {self.provider}")
        self.inputs = _specs(session.get_inputs())
        self.outputs = _specs(session.get_outputs())
        self._output_names = list(self.outputs)
        self._session: Session = session
        if self.provider == CUDA:
            self._session = FixedBatches(open_session)

    def run(self, arrays: Arrays) -> dict[str, Array]:
        """Compute all outputs of the graph from its inputs. Blocks, and releases Python's lock while it computes."""
        outputs = self._session.run(self._output_names, dict(arrays))
        return dict(zip(self._output_names, outputs, strict=True))


def _copy_of(file: Path, contents: Mapping[Path, bytes], folder: Path) -> str:
    """Write the contents of a graph and of its weights into a folder, and return the graph's file there.

    TensorRT's cache needs a file's name, and the file that the bytes came from may change until it is opened. Raises
    RuntimeSetupError if the copies cannot be written.
    """
    try:
        for path, content in contents.items():
            partial = folder / f"{path.name}.{os.getpid()}.partial"
            partial.write_bytes(content)
            partial.replace(folder / path.name)
    except OSError as error:
        raise RuntimeSetupError(f"{folder}: cannot be written: {error.strerror}; engine_cache names another") from error
    return str(folder / file.name)


def _session_options(ort: Any, threads: int, quantized: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin between calls take the cores from the event loop and from other processes.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not quantized:  # else weights in 8 bits would be converted again for each batch
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    elif saturates(_CPU_INFO_FILE):
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    return options


def _providers(ort: Any, device: str, tensorrt: TensorRtSetup | None) -> list[Any]:
    """Return the execution providers to request, the best first. Raises RuntimeSetupError."""
    available = ort.get_available_providers()
    providers: list[Any] = [CPU]
    if device != "cpu" and CUDA in available:
        ort.preload_dlls()
        providers = [CUDA, CPU]
    if device != "tensorrt":
        return providers
    if TENSORRT not in available:
        raise RuntimeSetupError(
            f"device tensorrt was asked for, but this ONNX Runtime has only {', '.join(available)}; it needs "
            "the extra gpu and TensorRT's own libraries"
        )
    if tensorrt is None:
        raise RuntimeSetupError("device tensorrt was asked for, but this graph has no batch sizes to build it for")
    try:
        tensorrt.cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeSetupError(
            f"{tensorrt.cache}: cannot be made: {error.strerror}; engine_cache names another"
        ) from error
    return [(TENSORRT, tensorrt.options(tensorrt.cache)), *providers]


def _specs(tensors: "list[_Tensor]") -> dict[str, TensorSpec]:
    """Return the specs of a session's inputs or outputs. Raises RuntimeSetupError for an unknown element type."""
    specs = {}
    for tensor in tensors:
        if tensor.type not in _DTYPES:
            raise RuntimeSetupError(f"{tensor.name} is a {tensor.type}; known are {', '.join(_DTYPES)}")
        shape = tuple(length if isinstance(length, int) else None for length in tensor.shape[1:])
        specs[tensor.name] = TensorSpec(np.dtype(_DTYPES[tensor.type]), shape)
    return specs
