"""Tests of the files for Triton Inference Server, read as Triton reads them: with its own protobuf messages."""

import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf import descriptor_pool, message_factory, text_format

from export.triton import CONFIG, LABELS, PRECISIONS, Options, TritonError, config, write
from serving.artifact import MODEL

NAME = "capsnet-mnist"
DIGITS = [str(digit) for digit in range(10)]
IMAGE = (1, 28, 28)
POSE = 16
DESCRIPTION = (
    "import sys; from tritonclient.grpc.model_config_pb2 import DESCRIPTOR; "
    "sys.stdout.buffer.write(DESCRIPTOR.serialized_pb)"
)


@cache
def messages() -> descriptor_pool.DescriptorPool:
    """Triton's own messages, read in another process and kept in their own pool.

    The server's messages in the default pool have the same names, and a pool cannot hold a name twice.
    """
    command = [sys.executable, "-c", DESCRIPTION]
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(subprocess.run(command, capture_output=True, check=True).stdout)
    return pool


def name_of(enum: str, number: int) -> Any:
    return messages().FindEnumTypeByName(f"inference.{enum}").values_by_number[number].name


def parsed(text: str) -> Any:
    model_config = message_factory.GetMessageClass(messages().FindMessageTypeByName("inference.ModelConfig"))
    return text_format.Parse(text, model_config())


def written(**options: Any) -> Any:
    return parsed(config(NAME, DIGITS, IMAGE, POSE, replace(Options(), **options)))


def accelerator(content: Any) -> dict[str, str]:
    """Return the parameters of the only accelerator."""
    (found,) = content.optimization.execution_accelerators.gpu_execution_accelerator
    assert found.name == "tensorrt"
    return dict(found.parameters)


def values(found: Any) -> list[tuple[str, str, list[int]]]:
    """Return the name, type and shape, without the batch axis, of a graph's inputs or outputs, in Triton's words."""
    types = {onnx.TensorProto.UINT8: "TYPE_UINT8", onnx.TensorProto.FLOAT: "TYPE_FP32"}
    tensors = [(value.name, value.type.tensor_type) for value in found]
    return [(name, types[of.elem_type], [size.dim_value for size in of.shape.dim[1:]]) for name, of in tensors]


def test_input_and_outputs_are_those_of_the_model_that_is_served() -> None:
    model = onnx.load(Path(__file__).parent.parent / "models" / NAME / "1" / MODEL).graph
    content = written()
    for described, real in ((content.input, model.input), (content.output, model.output)):
        assert [(value.name, name_of("DataType", value.data_type), list(value.dims)) for value in described] == values(
            real
        )


def test_a_model_is_described_with_its_input_and_outputs_and_without_the_batch_axis() -> None:
    content = written()
    assert (content.name, content.backend, content.default_model_filename) == (NAME, "onnxruntime", MODEL)
    (images,) = content.input
    assert (images.name, name_of("DataType", images.data_type)) == ("images", "TYPE_UINT8")
    assert list(images.dims) == [1, 28, 28]
    probabilities, poses = content.output
    assert (probabilities.name, list(probabilities.dims)) == ("probabilities", [10])
    assert (poses.name, list(poses.dims)) == ("poses", [10, 16])
    assert {name_of("DataType", output.data_type) for output in content.output} == {"TYPE_FP32"}
    assert (probabilities.label_filename, poses.label_filename) == ("labels.txt", "")


def test_requests_are_computed_together_and_an_idle_model_does_not_wait() -> None:
    content = written(max_batch_size=16)
    assert content.max_batch_size == 16
    assert content.HasField("dynamic_batching")
    assert not content.dynamic_batching.preferred_batch_size
    assert content.dynamic_batching.max_queue_delay_microseconds == 0
    assert written(max_queue_delay_us=500).dynamic_batching.max_queue_delay_microseconds == 500


def test_the_latest_version_alone_is_served_by_one_instance_a_device() -> None:
    content = written()
    assert content.version_policy.latest.num_versions == 1
    (group,) = content.instance_group
    assert (name_of("ModelInstanceGroup.Kind", group.kind), group.count) == ("KIND_AUTO", 1)


@pytest.mark.parametrize(("largest", "sizes"), [(1, [1]), (2, [1, 2]), (32, [1, 2, 32])])
def test_small_batches_and_the_largest_are_computed_before_the_first_request(largest: int, sizes: list[int]) -> None:
    warmups = written(max_batch_size=largest).model_warmup
    assert [warmup.batch_size for warmup in warmups] == sizes
    assert len({warmup.name for warmup in warmups}) == len(sizes)
    for warmup in warmups:
        ((name, pixels),) = warmup.inputs.items()
        assert (name, name_of("DataType", pixels.data_type)) == ("images", "TYPE_UINT8")
        assert list(pixels.dims) == [1, 28, 28]
        assert pixels.random_data


def test_tensorrt_builds_one_engine_for_all_batch_sizes() -> None:
    assert accelerator(written(max_batch_size=16)) == {
        "precision_mode": "FP32",
        "trt_profile_min_shapes": "images:1x1x28x28",
        "trt_profile_opt_shapes": "images:8x1x28x28",
        "trt_profile_max_shapes": "images:16x1x28x28",
    }


def test_tensorrts_engines_and_timings_are_kept_if_a_folder_is_given() -> None:
    assert accelerator(written(engine_cache="/var/cache/engines")).items() >= {
        ("trt_engine_cache_enable", "1"),
        ("trt_engine_cache_path", "/var/cache/engines"),
        ("trt_timing_cache_enable", "1"),
        ("trt_timing_cache_path", "/var/cache/engines"),
    }


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensorrt_computes_in_the_precision_that_is_asked_for(precision: str) -> None:
    assert accelerator(written(precision=precision))["precision_mode"] == precision


def test_tensorrt_can_be_left_out() -> None:
    assert not written(tensorrt=False).HasField("optimization")


def test_another_file_of_the_version_can_be_served() -> None:
    assert written(model_file="model-fp16.onnx").default_model_filename == "model-fp16.onnx"


@pytest.mark.parametrize("text", ['a "quoted" one', "a\\b", "tab\tand\rreturn\nand\0null", "sjöé 数字 🙂", "\x7f#{}[]"])
def test_every_text_comes_back_as_it_was(text: str) -> None:
    content = parsed(config(text, DIGITS, IMAGE, POSE, Options(model_file=text, engine_cache=text)))
    assert (content.name, content.default_model_filename) == (text, text)
    assert accelerator(content)["trt_engine_cache_path"] == text


def test_the_files_stand_in_the_models_folder_and_nothing_else_does(tmp_path: Path) -> None:
    folder = tmp_path / NAME
    version = folder / "1"
    version.mkdir(parents=True)
    write(folder, DIGITS, IMAGE, POSE)
    write(folder, ["cat", "dog"], (3, 32, 32), 8, Options(max_batch_size=4))
    assert {path.name for path in folder.iterdir()} == {"1", CONFIG, LABELS}
    content = parsed((folder / CONFIG).read_text())
    assert (content.name, content.max_batch_size) == (NAME, 4)
    assert [list(output.dims) for output in content.output] == [[2], [2, 8]]
    assert (folder / LABELS).read_bytes() == b"cat\ndog\n"


def test_labels_are_one_a_line_whatever_else_they_hold(tmp_path: Path) -> None:
    labels = ["", "a b", "größe", "\ttab", '"', "x\u2028y"]
    write(tmp_path, labels, IMAGE, POSE)
    assert (tmp_path / LABELS).read_bytes().decode().split("\n") == [*labels, ""]


def test_a_label_with_a_line_break_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(TritonError, match=r"the label 'two\\nlines' has a line break; Triton reads one label a line"):
        write(tmp_path, ["one", "two\nlines"], IMAGE, POSE)
    assert not list(tmp_path.iterdir())


def test_no_labels_are_refused() -> None:
    with pytest.raises(TritonError, match="there are no labels"):
        config(NAME, [], IMAGE, POSE)


@pytest.mark.parametrize("name", ["", "a/b", "a/", "/"])
def test_a_name_that_is_no_folders_is_refused(name: str) -> None:
    with pytest.raises(TritonError, match="is not the name of a model's folder"):
        config(name, DIGITS, IMAGE, POSE)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size is 0; expected 1 or more"),
        ({"max_queue_delay_us": -1}, "max_queue_delay_us is -1; expected 0 or more"),
        ({"precision": "INT8"}, "precision is 'INT8'; expected one of FP32, FP16, BF16"),
    ],
)
def test_an_option_that_cannot_be_is_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(TritonError, match=message):
        Options(**option)
