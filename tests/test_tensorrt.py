"""Tests of the TensorRT build with a stand-in: the calls, the written files, and the errors on failure.

The stand-in follows the source of TensorRT's Python binding: functions return None or False and give their reason to
the logger, ``Builder`` raises TypeError, and memory comes as buffers.
"""

import sys
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from export.to_tensorrt import EngineError, TensorRTMissing, build_engine
from serving.tensorrt_options import CONTEXT_MODEL, BatchProfile, execution_provider_options

PROFILE = BatchProfile(1, 8, 32)
IMAGE = (1, 28, 28)
GPU = b"H200:"  # the first bytes of the stand-in's timing caches


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        self.made = True


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(IntEnum):
    TF32 = 6


class Tensor:
    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self.name = value.name
        self.shape = [-1 if size.dim_param else size.dim_value for size in value.type.tensor_type.shape.dim]


class Network:
    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]


class ParserError:
    def __init__(self, index: int, name: str, operator: str, code: str, description: str) -> None:
        self.node = lambda: index
        self.node_name = lambda: name
        self.node_operator = lambda: operator
        self.code = lambda: code
        self.desc = lambda: description


class OnnxParser:
    def __init__(self, network: Network, logger: Any) -> None:
        assert logger.made
        self.network = network
        self.errors: list[ParserError] = []

    def parse_from_file(self, model: str) -> bool:
        try:
            graph = onnx.load(model).graph
        except Exception:
            self.errors.append(ParserError(-1, "", "", "MODEL_DESERIALIZE_FAILED", "Failed to parse the ONNX model."))
            return False
        self.network.inputs.extend(Tensor(value) for value in graph.input)
        self.errors.extend(
            ParserError(index, node.name, node.op_type, "UNSUPPORTED_NODE", "no importer registered")
            for index, node in enumerate(graph.node)
            if node.op_type == "Erf"
        )
        return not self.errors

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> ParserError:
        return self.errors[index]


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        self.shapes[input] = [min, opt, max]


class TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content or GPU

    def serialize(self) -> memoryview:
        return memoryview(self.content + b"timed")


class Config:
    def __init__(self, profile_index: int) -> None:
        self.flags = {BuilderFlag.TF32}
        self.profiles: list[Profile] = []
        self.profile_index = profile_index
        self.cache: TimingCache | None = None

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.remove(flag)

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return self.profile_index

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None:
        return None if serialized_timing_cache == b"damaged" else TimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if not cache.content.startswith(GPU):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.cache


class FakeTensorRT(ModuleType):
    """A stand-in for ``tensorrt``. ``network_flags`` and ``config`` hold what was built. Tests set faults."""

    ILogger, NetworkDefinitionCreationFlag, BuilderFlag = ILogger, NetworkDefinitionCreationFlag, BuilderFlag
    OnnxParser = OnnxParser

    def __init__(self) -> None:
        super().__init__("tensorrt")
        self.__version__ = "11.1.0.106"
        self.start_problem: tuple[Severity, str] | None = None
        self.build_problem = ""
        self.profile_index = 0
        self.network_flags = 0
        self.config: Any = None
        fake = self

        class Builder:
            def __init__(self, logger: Any) -> None:
                assert logger.made
                self.logger = logger
                if fake.start_problem is not None:
                    logger.log(*fake.start_problem)
                    raise TypeError("pybind11::init(): factory function returned nullptr")

            def create_network(self, flags: int) -> Network:
                fake.network_flags = flags
                return Network()

            def create_builder_config(self) -> Config:
                fake.config = Config(fake.profile_index)
                return fake.config  # type: ignore[no-any-return]

            def create_optimization_profile(self) -> Profile:
                return Profile()

            def build_serialized_network(self, network: Network, config: Config) -> memoryview | None:
                self.logger.log(Severity.INFO, "building")
                if fake.build_problem:
                    self.logger.log(Severity.ERROR, fake.build_problem)
                    return None
                return memoryview(b"an engine")

        self.Builder = Builder


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    return fake


def save_model(file: Path, operator: str = "Relu", shape: tuple[str | int, ...] = ("batch", *IMAGE)) -> Path:
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, shape)
    answer = helper.make_tensor_value_info("answer", TensorProto.FLOAT, shape)
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], "node_cast", to=TensorProto.FLOAT),
        helper.make_node(operator, ["pixels"], ["answer"], "node_last"),
    ]
    onnx.save_model(helper.make_model(helper.make_graph(nodes, "graph", [images], [answer])), file)
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model.onnx")


def test_an_engine_is_built_strongly_typed_for_all_batch_sizes_of_the_profile(
    tensorrt: FakeTensorRT, model: Path, tmp_path: Path
) -> None:
    build_engine(model, tmp_path / "model.engine", PROFILE)
    assert (tmp_path / "model.engine").read_bytes() == b"an engine"
    assert tensorrt.network_flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
    (profile,) = tensorrt.config.profiles
    assert profile.shapes == {"images": [(1, *IMAGE), (8, *IMAGE), (32, *IMAGE)]}
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.engine"}


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_is_multiplied_in_full_unless_tf32_is_asked_for(
    tensorrt: FakeTensorRT, model: Path, tmp_path: Path, tf32: bool
) -> None:
    build_engine(model, tmp_path / "model.engine", PROFILE, tf32=tf32)
    assert (BuilderFlag.TF32 in tensorrt.config.flags) == tf32


def test_kernel_times_are_kept_from_one_build_to_the_next(tensorrt: FakeTensorRT, model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    for times in (1, 2):
        build_engine(model, tmp_path / "model.engine", PROFILE, cache)
        assert cache.read_bytes() == GPU + b"timed" * times


@pytest.mark.parametrize("content", [b"A100:timed", b"damaged"])
def test_kernel_times_that_do_not_fit_are_discarded_with_a_message(
    tensorrt: FakeTensorRT, model: Path, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(content)
    build_engine(model, tmp_path / "model.engine", PROFILE, cache)
    assert cache.read_bytes() == GPU + b"timed"
    assert f"{cache}: of another GPU or TensorRT, or damaged; it is begun anew" in caplog.text


def test_a_node_that_tensorrt_does_not_know_is_named(tensorrt: FakeTensorRT, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.onnx", operator="Erf")
    with pytest.raises(EngineError) as caught:
        build_engine(model, tmp_path / "model.engine", PROFILE)
    assert str(caught.value) == (
        f"{model}: TensorRT 11.1.0.106 cannot parse it: node 1 'node_last' (Erf): UNSUPPORTED_NODE: "
        "no importer registered"
    )
    assert not (tmp_path / "model.engine").exists()


def test_a_file_that_is_no_onnx_is_reported_without_a_node(tensorrt: FakeTensorRT, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"\xff")
    with pytest.raises(EngineError, match="cannot parse it: MODEL_DESERIALIZE_FAILED: Failed to parse the ONNX model"):
        build_engine(file, tmp_path / "model.engine", PROFILE)


@pytest.mark.parametrize("shape", [(2, *IMAGE), ("batch", 1, 28, "width"), ("batch", 784)])
def test_a_model_with_another_input_is_refused(
    tensorrt: FakeTensorRT, tmp_path: Path, shape: tuple[str | int, ...]
) -> None:
    model = save_model(tmp_path / "model.onnx", shape=shape)
    with pytest.raises(EngineError, match=r"its inputs are \[\('images', .*; expected one, \(-1, C, H, W\)"):
        build_engine(model, tmp_path / "model.engine", PROFILE)


def test_a_profile_that_tensorrt_refuses_is_reported(tensorrt: FakeTensorRT, model: Path, tmp_path: Path) -> None:
    tensorrt.profile_index = -1
    with pytest.raises(EngineError, match=r"does not take BatchProfile\(min=1, opt=8, max=32\) for images"):
        build_engine(model, tmp_path / "model.engine", PROFILE)


def test_a_failed_build_says_why_and_keeps_the_previous_files(
    tensorrt: FakeTensorRT, model: Path, tmp_path: Path
) -> None:
    engine, cache = tmp_path / "model.engine", tmp_path / "timing.cache"
    engine.write_bytes(b"the engine before")
    tensorrt.build_problem = "Could not find any implementation for node node_last"
    with pytest.raises(EngineError, match="cannot build an engine: Could not find any implementation for node"):
        build_engine(model, engine, PROFILE, cache)
    assert engine.read_bytes() == b"the engine before"
    assert not cache.exists()


def test_without_the_package_the_message_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(TensorRTMissing) as caught:
        build_engine(model, tmp_path / "model.engine", PROFILE)
    assert str(caught.value).startswith("the Python package tensorrt is not installed")
    assert "install tensorrt-cu13" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ImportError('libnvinfer.so.11: cannot open shared object file')", "libnvinfer.so.11: cannot open"),
        ("raise OSError('libcuda.so.1: cannot open shared object file')", "libcuda.so.1: cannot open"),
        ("import tensorrt_bindings_of_nobody", "the Python package tensorrt lacks tensorrt_bindings_of_nobody"),
    ],
)
def test_a_package_that_does_not_load_is_reported_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path, source: str, message: str
) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tensorrt.py").write_text(source)
    with pytest.raises(TensorRTMissing, match=message):
        build_engine(model, tmp_path / "model.engine", PROFILE)


def test_a_tensorrt_that_is_too_old_is_reported(tensorrt: FakeTensorRT, model: Path, tmp_path: Path) -> None:
    tensorrt.__version__ = "8.6.1"
    with pytest.raises(TensorRTMissing, match=r"TensorRT 8\.6\.1 is installed, and 10 or newer is needed"):
        build_engine(model, tmp_path / "model.engine", PROFILE)


@pytest.mark.parametrize("severity", [Severity.ERROR, Severity.WARNING])
def test_a_machine_without_a_gpu_or_driver_is_reported_in_tensorrts_words(
    tensorrt: FakeTensorRT, model: Path, tmp_path: Path, severity: Severity
) -> None:
    tensorrt.start_problem = severity, "CUDA initialization failure with error: 35"
    with pytest.raises(TensorRTMissing, match=r"does not start: CUDA initialization failure with error: 35\. It needs"):
        build_engine(model, tmp_path / "model.engine", PROFILE)


def test_onnx_runtime_gets_the_profile_and_the_caches() -> None:
    assert execution_provider_options(PROFILE, (3, 32, 48), Path("/cache/abc")) == {
        "trt_profile_min_shapes": "images:1x3x32x48",
        "trt_profile_opt_shapes": "images:8x3x32x48",
        "trt_profile_max_shapes": "images:32x3x32x48",
        "trt_fp16_enable": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": "engines",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": "/cache/abc",
        "trt_dump_ep_context_model": "1",
        "trt_ep_context_file_path": f"/cache/abc/{CONTEXT_MODEL}",
        "trt_ep_context_embed_mode": "0",
    }
    assert execution_provider_options(PROFILE, IMAGE, Path("x"), fp16=True)["trt_fp16_enable"] == "1"


@pytest.mark.parametrize("sizes", [(0, 1, 1), (2, 1, 4), (1, 8, 4)])
def test_batch_sizes_out_of_order_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected 1 <= min <= opt <= max"):
        BatchProfile(*sizes)
