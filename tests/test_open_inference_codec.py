"""Tests of ModelInfer's messages without a server: the decoding of requests, and the bytes of answers."""

import asyncio
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from protos.inference import inference_pb2 as pb
from serving.artifact import Artifact, Graph, ReceptiveField, Tensor, Training
from serving.batching.ticket import Share
from serving.errors import InvalidRequest, QueueFull
from serving.repository.served_model import ServedModel
from serving.runtime import Arrays
from serving.services.computation import Computation
from serving.services.decoding import Decoder, Steps
from serving.services.infer_outputs import FurtherOutputs
from serving.services.infer_parameters import schedule
from serving.services.infer_queries import (
    ComputedInferQuery,
    InferCodec,
    StreamedInferQuery,
    infer_query,
    streamed_infer_query,
)
from serving.services.open_inference_codec import Output, TensorMessages, Wanted, read_request, refused
from serving.services.per_model import PerModel
from serving.services.tensor_inputs import Received, TensorReader
from serving.settings import Settings
from serving.tensorrt_options import BatchProfile

LABELS = ("circle", "a:b", "größe", "")
MAX_IMAGES = 5
MAX_BYTES = 2**20
ARTIFACT = Artifact(
    folder=Path(),
    name="shapes",
    version="7",
    labels=LABELS,
    image_shape=(3, 4, 5),
    pose_size=2,
    files={},
    variants={},
    graphs={},
    batches=BatchProfile(1, 1, 1),
    training=Training("shapes"),
)
MESSAGES = TensorMessages(ARTIFACT)
READER = TensorReader(ARTIFACT, Settings(max_images_per_request=MAX_IMAGES))
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), np.uint8)


def _request(pixels: NDArray[np.uint8] = PIXELS) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(raw_input_contents=[pixels.tobytes()])
    request.inputs.add(name="images", datatype="UINT8", shape=pixels.shape)
    return request


def _typed(pixels: NDArray[np.uint8] = PIXELS) -> pb.ModelInferRequest:
    request = _request(pixels)
    request.ClearField("raw_input_contents")
    request.inputs[0].contents.uint_contents.extend(pixels.ravel().tolist())
    return request


def _prediction(images: int, seed: int = 0) -> Share:
    rng = np.random.default_rng(seed)
    return _share(rng.random((images, 4), np.float32), rng.standard_normal((images, 4, 2), np.float32))


def _share(probabilities: NDArray[np.float32], poses: NDArray[np.float32]) -> Share:
    return Share({"probabilities": probabilities, "poses": poses}, 0, len(probabilities))


def _asking(*outputs: tuple[str, dict[str, pb.InferParameter]]) -> pb.ModelInferRequest:
    request = _request()
    for name, parameters in outputs:
        request.outputs.add(name=name, parameters=parameters)
    return request


@pytest.mark.parametrize("images", [1, MAX_IMAGES])
@pytest.mark.parametrize("form", [_request, _typed])
def test_pixels_arrive_as_they_were_sent(form: Callable[..., pb.ModelInferRequest], images: int) -> None:
    pixels = np.random.default_rng(images).integers(0, 256, (images, 3, 4, 5), np.uint8)
    received = read_request(form(pixels).SerializeToString(), MAX_BYTES)
    images_read = READER.images(received)
    assert images_read.dtype == np.uint8
    np.testing.assert_array_equal(images_read, pixels)


def _two_inputs(request: pb.ModelInferRequest) -> None:
    request.inputs.add(name="more", datatype="UINT8", shape=(1,))


def _name(request: pb.ModelInferRequest) -> None:
    request.inputs[0].name = "pixels" + "!" * 200


def _datatype(request: pb.ModelInferRequest) -> None:
    request.inputs[0].datatype = "FP16"


def _set_shape(*shape: int) -> Callable[[pb.ModelInferRequest], None]:
    def change(request: pb.ModelInferRequest) -> None:
        request.inputs[0].shape[:] = shape

    return change


def _no_raw(request: pb.ModelInferRequest) -> None:
    request.ClearField("raw_input_contents")


def _short_raw(request: pb.ModelInferRequest) -> None:
    request.raw_input_contents[0] = b"short"


def _two_raw(request: pb.ModelInferRequest) -> None:
    request.raw_input_contents.append(b"")


def _both(request: pb.ModelInferRequest) -> None:
    request.inputs[0].contents.uint_contents.append(1)


def _wrong_kind(request: pb.ModelInferRequest) -> None:
    _no_raw(request)
    request.inputs[0].contents.fp32_contents.append(1)


def _few_typed(request: pb.ModelInferRequest) -> None:
    _no_raw(request)
    request.inputs[0].contents.uint_contents.extend([1, 2])


def _no_pixel(request: pb.ModelInferRequest) -> None:
    request.CopyFrom(_typed())
    request.inputs[0].contents.uint_contents[7] = 256


def _shared_memory(request: pb.ModelInferRequest) -> None:
    request.inputs[0].parameters["shared_memory_region"].string_param = "region"


@pytest.mark.parametrize(
    ("change", "field", "description"),
    [
        (pb.ModelInferRequest.Clear, "inputs", "0 tensors; expected one, 'images'"),
        (_two_inputs, "inputs", "2 tensors; expected one, 'images'"),
        (_name, "inputs[0].name", f"'pixels{'!' * 58}'; expected 'images'"),
        (_datatype, "inputs[0].datatype", "'FP16'; expected 'UINT8', 'FP32' or 'BYTES'"),
        (_set_shape(), "inputs[0].shape", "[]; expected [n, 3, 4, 5], n from 1 to 5 (max_images_per_request)"),
        (_set_shape(3, 4, 5), "inputs[0].shape", "[3, 4, 5]; expected [n, 3, 4, 5], n from 1 to 5"),
        (_set_shape(2, 3, 5, 4), "inputs[0].shape", "[2, 3, 5, 4]; expected [n, 3, 4, 5]"),
        (_set_shape(6, 3, 4, 5), "inputs[0].shape", "[6, 3, 4, 5]; expected [n, 3, 4, 5], n from 1 to 5"),
        (_set_shape(0, 3, 4, 5), "inputs[0].shape", "[0, 3, 4, 5]; expected"),
        (_set_shape(-1, 3, 4, 5), "inputs[0].shape", "[-1, 3, 4, 5]; expected"),
        (_set_shape(*[1] * 1000), "inputs[0].shape", "[1, 1, 1, 1, 1, 1, 1, 1, ...]; expected"),
        (_no_raw, "raw_input_contents", "none; expected one, of 120 bytes, for 'images'"),
        (_short_raw, "raw_input_contents[0]", "5 bytes; expected 120 (2 x 3 x 4 x 5)"),
        (_two_raw, "raw_input_contents", "2; expected one, for 'images'"),
        (_both, "inputs[0].contents", "came with raw_input_contents; expected one of the two"),
        (_wrong_kind, "inputs[0].contents.fp32_contents", "not for UINT8; expected uint_contents"),
        (_few_typed, "inputs[0].contents.uint_contents", "2 values; expected 120 (2 x 3 x 4 x 5)"),
        (_no_pixel, "inputs[0].contents.uint_contents[7]", "256; expected 0 to 255"),
        (_shared_memory, 'inputs[0].parameters["shared_memory_region"]', "shared memory is not supported"),
    ],
)
def test_a_wrong_input_is_refused_by_its_field(
    change: Callable[[pb.ModelInferRequest], None], field: str, description: str
) -> None:
    request = _request()
    change(request)
    with pytest.raises(InvalidRequest) as caught:
        READER.images(read_request(request.SerializeToString(), MAX_BYTES))
    assert caught.value.field == field
    assert caught.value.description.startswith(description)


def _as_floats(numbers: list[float], pixel_max: int = 1, typed: bool = False) -> NDArray[np.uint8]:
    """Return one image of 60 pixels that begins with these numbers, as it is read from floats."""
    values = np.zeros((1, 3, 4, 5), np.float32)
    values.ravel()[: len(numbers)] = numbers
    request = pb.ModelInferRequest()
    request.inputs.add(name="images", datatype="FP32", shape=values.shape)
    if typed:
        request.inputs[0].contents.fp32_contents.extend(values.ravel().tolist())
    else:
        request.raw_input_contents.append(values.tobytes())
    if pixel_max != 1:
        request.inputs[0].parameters["pixel_max"].int64_param = pixel_max
    received = read_request(request.SerializeToString(), MAX_BYTES)
    decoding = READER.decoding(received)
    images: NDArray[np.uint8] = READER.images(received)
    np.testing.assert_array_equal(images, _last(decoding.steps)["images"])
    return images.ravel()[: len(numbers)]


def _last(steps: Steps) -> Arrays:
    """Return the arrays at the end of a decoding."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            arrays: Arrays = stop.value
            return arrays


@pytest.mark.parametrize("typed", [False, True])
def test_floats_are_rounded_to_the_pixels_of_the_network(typed: bool) -> None:
    every = [value / 255 for value in range(60)]
    assert _as_floats(every, typed=typed).tolist() == list(range(60))
    assert _as_floats([0.0, 1.0, 0.4 / 255, 0.6 / 255], typed=typed).tolist() == [0, 255, 0, 1]
    assert _as_floats([0.4, 0.6, 254.6, 255.0], 255, typed).tolist() == [0, 1, 255, 255]


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize(("number", "pixel_max"), [(-0.001, 1), (1.001, 1), (255.1, 255), (np.nan, 1), (np.inf, 255)])
def test_a_float_that_is_no_pixel_is_named_with_its_place(number: float, pixel_max: int, typed: bool) -> None:
    with pytest.raises(InvalidRequest) as caught:
        _as_floats([0.5, number, -5], pixel_max, typed)
    field = "inputs[0].contents.fp32_contents" if typed else "raw_input_contents[0]"
    assert caught.value.field == f"{field}[1]"
    assert caught.value.description.startswith(f"{number:g}; expected 0 to {pixel_max}")


def _files_request(*files: bytes, shape: tuple[int, ...] = (2,)) -> pb.ModelInferRequest:
    raw = b"".join(struct.pack("<I", len(file)) + file for file in files)
    request = pb.ModelInferRequest(raw_input_contents=[raw])
    request.inputs.add(name="images", datatype="BYTES", shape=shape)
    return request


@pytest.mark.parametrize(
    ("request_", "field", "description"),
    [
        (_files_request(b"a"), "raw_input_contents[0]", "5 bytes that are not 2 files; expected each file after its"),
        (_files_request(b"a", b"b", b"c"), "raw_input_contents[0]", "15 bytes that are not 2 files"),
        (_files_request(b"a", b"b", shape=(2, 2)), "inputs[0].shape", "[2, 2]; expected [n] or [n, 1], n from 1 to 5"),
        (_files_request(shape=()), "inputs[0].shape", "[]; expected [n] or [n, 1]"),
        (
            _files_request(b"no image", shape=(1, 1)),
            "raw_input_contents[0][0]",
            "8 bytes that are neither a PNG nor a JPEG file",
        ),
        (
            pb.ModelInferRequest(raw_input_contents=[b"\xff\xff\xff\xffabc"]),
            "raw_input_contents[0]",
            "7 bytes that are",
        ),
        (pb.ModelInferRequest(raw_input_contents=[b"\1\0"]), "raw_input_contents[0]", "2 bytes that are not 2 files"),
        (pb.ModelInferRequest(), "raw_input_contents", "none; expected one, for 'images'"),
    ],
)
def test_a_wrong_file_is_refused_by_its_field(request_: pb.ModelInferRequest, field: str, description: str) -> None:
    request = pb.ModelInferRequest()
    request.CopyFrom(request_)
    if not request.inputs:
        request.inputs.add(name="images", datatype="BYTES", shape=(2,))
    with pytest.raises(InvalidRequest) as caught:
        READER.images(read_request(request.SerializeToString(), MAX_BYTES))
    assert caught.value.field == field
    assert caught.value.description.startswith(description)


def test_the_number_of_files_in_contents_must_be_that_of_the_shape() -> None:
    request = pb.ModelInferRequest()
    request.inputs.add(name="images", datatype="BYTES", shape=(2,)).contents.bytes_contents.extend([b"", b"", b""])
    with pytest.raises(InvalidRequest, match="3 files; expected 2"):
        READER.images(read_request(request.SerializeToString(), MAX_BYTES))
    request.inputs[0].datatype = "FP32"
    request.inputs[0].shape[:] = (1, 3, 4, 5)
    with pytest.raises(InvalidRequest, match="not for FP32; expected fp32_contents"):
        READER.images(read_request(request.SerializeToString(), MAX_BYTES))


@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize(
    ("datatype", "name", "parameter", "description"),
    [
        ("FP32", "pixel_max", pb.InferParameter(int64_param=2), "2; expected 1 or 255"),
        ("FP32", "pixel_max", pb.InferParameter(double_param=0.5), "double_param '0.5'; expected a whole number"),
        ("FP32", "pixel_max", pb.InferParameter(bool_param=True), "bool_param 'True'; expected a whole number"),
        ("UINT8", "pixel_max", pb.InferParameter(int64_param=1), "1 for 'UINT8'; expected with 'FP32' alone"),
        ("UINT8", "preprocess", pb.InferParameter(string_param="auto"), "'auto' for 'UINT8'; expected with 'BYTES'"),
        ("BYTES", "preprocess", pb.InferParameter(string_param="x" * 99), f"'{'x' * 64}'; expected 'none' or 'auto'"),
        ("BYTES", "preprocess", pb.InferParameter(bool_param=True), "'True'; expected 'none' or 'auto'"),
    ],
)
def test_a_wrong_parameter_of_the_images_is_refused_by_its_field(
    datatype: str, name: str, parameter: pb.InferParameter, description: str, of_input: bool
) -> None:
    request = _request()
    request.inputs[0].datatype = datatype
    if datatype == "BYTES":
        request.inputs[0].shape[:] = (2,)
    (request.inputs[0] if of_input else request).parameters[name].CopyFrom(parameter)
    with pytest.raises(InvalidRequest) as caught:
        READER.images(read_request(request.SerializeToString(), MAX_BYTES))
    assert caught.value.field == ("inputs[0]." if of_input else "") + f'parameters["{name}"]'
    assert caught.value.description.startswith(description)


def test_parameters_that_change_nothing_are_taken() -> None:
    request = _request()
    request.parameters["pixel_max"].double_param = 255.0
    request.parameters["preprocess"].string_param = "none"
    np.testing.assert_array_equal(READER.images(read_request(request.SerializeToString(), MAX_BYTES)), PIXELS)


def test_more_classes_than_there_are_give_all() -> None:
    request = _asking(("probabilities", {"classification": pb.InferParameter(int64_param=5)}))
    assert MESSAGES.wanted(request) == Wanted((Output("probabilities", 4),))


@pytest.mark.parametrize("name", ["confidence", "couplings", "contributions", "relevance", "reconstruction"])
def test_a_model_without_graphs_and_calibration_has_no_further_outputs(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        MESSAGES.wanted(_asking((name, {})))
    assert str(caught.value) == f"outputs[0].name: {name!r}; expected 'probabilities' or 'poses'"


def test_relevance_is_refused_if_the_queue_cannot_hold_its_images() -> None:
    further = FurtherOutputs(ARTIFACT, Settings(max_queue=20, max_images_per_request=20))
    further.check({"poses": None, "couplings": None}, 8)
    with pytest.raises(InvalidRequest) as caught:
        further.check({"poses": None, "relevance": None}, 1)
    text = "the relevance takes 21 images at once; the queue holds only 20 (max_queue)"
    assert str(caught.value) == f"outputs[1].name: {text}"


def test_timeout_and_priority_hold_for_each_run_of_a_request() -> None:
    request = _asking(("relevance", {}))
    request.parameters["priority"].int64_param = 1
    request.parameters["timeout"].int64_param = 5_000_000
    query = infer_query(read_request(request.SerializeToString(), MAX_BYTES), 100, PerModel(_codec))
    asked: dict[str, Any] = {}

    class Batcher:
        """A batcher that notes what a run asks for, and refuses it."""

        def enqueue(self, arrays: Arrays, **wishes: Any) -> Any:
            asked.update(wishes)
            raise QueueFull("full", 1.0)

    metrics = SimpleNamespace(failed=lambda error, seconds: None)
    graph = SimpleNamespace(batcher=Batcher(), metrics=metrics)
    model: Any = _Model()
    model.graph = lambda name: graph
    caller: Any = SimpleNamespace(client="c", deadline=time.monotonic() + 60)
    computation = Computation(model, caller, cast(Decoder, None))
    assert isinstance(query, ComputedInferQuery)
    with pytest.raises(QueueFull):
        asyncio.run(query.answer(computation))
    assert asked["urgent"] and asked["deadline"] < time.monotonic() + 6


class _Model:
    """A model of the artifact with a graph that explains."""

    artifact = ARTIFACT


def _codec(model: ServedModel) -> InferCodec:
    tensors = {
        "couplings": Tensor("float32", (3, 4, 6)),
        "agreements": Tensor("float32", (3, 4, 6)),
        "contributions": Tensor("float32", (4, 6)),
        "primary_lengths": Tensor("float32", (6,)),
    }
    explain = Graph("explain.onnx", outputs=tensors, receptive_field=ReceptiveField("type", 6, 1, 1, 4))
    return InferCodec.of(replace(ARTIFACT, graphs={"explain": explain}), Settings())


def test_binary_data_output_must_be_true_or_false() -> None:
    request = _request()
    request.parameters["binary_data_output"].bool_param = False
    assert MESSAGES.wanted(request) == Wanted((Output("probabilities"), Output("poses")), contents=True)
    request.parameters["binary_data_output"].int64_param = 0
    with pytest.raises(InvalidRequest) as caught:
        MESSAGES.wanted(request)
    assert str(caught.value) == "parameters[\"binary_data_output\"]: '0'; expected true or false, in bool_param"


@pytest.mark.parametrize("outputs", [("probabilities", "poses"), ("poses",)])
def test_an_answer_in_contents_has_the_same_values(outputs: tuple[str, ...]) -> None:
    prediction = _prediction(3)
    wanted = Wanted((*map(Output, outputs), Output("confidence", 2)), contents=True)
    share = Share({**prediction.batch, "confidences": prediction["probabilities"]}, 0, 3)
    response = pb.ModelInferResponse.FromString(MESSAGES.encode("7", wanted, share))
    assert (response.id, len(response.raw_output_contents)) == ("7", 0)
    *numbers, classified = response.outputs
    for output in numbers:
        assert (output.datatype, list(output.shape)) == ("FP32", list(prediction[output.name].shape))
        assert list(output.contents.fp32_contents) == prediction[output.name].ravel().tolist()
    expected = _plain("", (Output("probabilities", 2),), prediction)
    raw = b"".join(struct.pack("<I", len(text)) + text for text in classified.contents.bytes_contents)
    assert (raw, list(classified.shape)) == (expected.raw_output_contents[0], [3, 2])
    streamed = pb.ModelStreamInferResponse.FromString(MESSAGES.encode_for_stream("7", wanted, share))
    assert streamed.infer_response.outputs == response.outputs


def test_all_outputs_come_if_none_is_named() -> None:
    assert MESSAGES.wanted(_request()) == Wanted((Output("probabilities"), Output("poses")))


def test_named_outputs_come_in_the_order_of_the_request() -> None:
    assert MESSAGES.wanted(_asking(("poses", {}))) == Wanted((Output("poses"),))
    both = _asking(("poses", {}), ("probabilities", {"classification": pb.InferParameter(int64_param=3)}))
    assert MESSAGES.wanted(both) == Wanted((Output("poses"), Output("probabilities", 3)))


def test_a_parameter_of_an_output_without_meaning_here_is_ignored() -> None:
    request = _asking(("poses", {"binary_data": pb.InferParameter(bool_param=True)}))
    assert MESSAGES.wanted(request) == Wanted((Output("poses"),))


@pytest.mark.parametrize(
    ("outputs", "field", "description"),
    [
        ([("scores", {})], "outputs[0].name", "'scores'; expected 'probabilities' or 'poses'"),
        ([("poses", {}), ("poses", {})], "outputs[1].name", "'poses' once more; expected each output once"),
        (
            [("poses", {"classification": pb.InferParameter(int64_param=1)})],
            'outputs[0].parameters["classification"]',
            "on 'poses'; expected on 'probabilities' or 'confidence' alone",
        ),
        *(
            (
                [("probabilities", {"classification": parameter})],
                'outputs[0].parameters["classification"]',
                description,
            )
            for parameter, description in [
                (pb.InferParameter(int64_param=0), "0; expected 1 or more; all classes come if there are fewer"),
                (pb.InferParameter(int64_param=-1), "int64_param '-1'; expected a whole number from 0 up"),
                (pb.InferParameter(bool_param=True), "bool_param 'True'; expected a whole number"),
                (pb.InferParameter(), "no value; expected a whole number"),
            ]
        ),
        (
            [("poses", {"shared_memory_region": pb.InferParameter(string_param="region")})],
            'outputs[0].parameters["shared_memory_region"]',
            "shared memory is not supported",
        ),
    ],
)
def test_a_wrong_output_is_refused_by_its_field(
    outputs: list[tuple[str, dict[str, pb.InferParameter]]], field: str, description: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        MESSAGES.wanted(_asking(*outputs))
    assert caught.value.field == field
    assert caught.value.description.startswith(description)


@pytest.mark.parametrize(
    ("parameters", "timeout", "urgent"),
    [
        ({}, None, False),
        ({"timeout": pb.InferParameter(int64_param=1500)}, 0.0015, False),
        ({"timeout": pb.InferParameter(uint64_param=2_000_000)}, 2.0, False),
        ({"timeout": pb.InferParameter(string_param="1500")}, 0.0015, False),
        ({"timeout": pb.InferParameter(int64_param=0)}, None, False),
        ({"priority": pb.InferParameter(uint64_param=1)}, None, True),
        ({"priority": pb.InferParameter(int64_param=1)}, None, True),
        ({"priority": pb.InferParameter(string_param="1")}, None, True),
        ({"priority": pb.InferParameter(uint64_param=0)}, None, False),
        ({"priority": pb.InferParameter(uint64_param=2)}, None, False),
        ({"sequence_id": pb.InferParameter(int64_param=0), "sequence_start": pb.InferParameter()}, None, False),
        ({"something": pb.InferParameter(double_param=1.5)}, None, False),
    ],
)
def test_timeout_and_priority_are_read(
    parameters: dict[str, pb.InferParameter], timeout: float | None, urgent: bool
) -> None:
    assert schedule(pb.ModelInferRequest(parameters=parameters).parameters) == (timeout, urgent)


@pytest.mark.parametrize(
    ("name", "parameter", "description"),
    [
        ("timeout", pb.InferParameter(int64_param=-1), "int64_param '-1'; expected a whole number from 0 up"),
        ("timeout", pb.InferParameter(double_param=0.5), "double_param '0.5'; expected a whole number from 0 up"),
        ("priority", pb.InferParameter(bool_param=True), "bool_param 'True'; expected a whole number from 0 up"),
        ("priority", pb.InferParameter(string_param="high"), "string_param 'high'; expected a whole number from 0 up"),
        ("priority", pb.InferParameter(string_param="9" * 5000), f"string_param '{'9' * 64}'; expected a whole number"),
        ("sequence_id", pb.InferParameter(int64_param=5), "'5'; expected none, since sequences are not supported"),
        ("sequence_id", pb.InferParameter(string_param="a"), "'a'; expected none, since sequences are not supported"),
        ("sequence_start", pb.InferParameter(bool_param=True), "'True'; expected none"),
        ("sequence_end", pb.InferParameter(bool_param=True), "'True'; expected none"),
    ],
)
def test_a_wrong_parameter_is_refused_by_its_name(name: str, parameter: pb.InferParameter, description: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        schedule(pb.ModelInferRequest(parameters={name: parameter}).parameters)
    assert caught.value.field == f'parameters["{name}"]'
    assert caught.value.description.startswith(description)


SELECTIONS: list[tuple[Output, ...]] = [
    (Output("probabilities"), Output("poses")),
    (Output("poses"), Output("probabilities")),
    (Output("poses"),),
    (Output("probabilities", 2),),
    (Output("poses"), Output("probabilities", 4)),
]


def _plain(identifier: str, outputs: tuple[Output, ...], prediction: Share) -> pb.ModelInferResponse:
    """Return the answer as protobuf's own classes build it."""
    images = len(prediction)
    response = pb.ModelInferResponse(model_name="shapes", model_version="7", id=identifier)
    for output in outputs:
        if output.classes:
            response.outputs.add(name=output.name, datatype="BYTES", shape=(images, output.classes))
            data = b""
            for row in np.asarray(prediction["probabilities"], np.float32):
                for index in sorted(range(4), key=lambda index: -row[index])[: output.classes]:
                    text = f"{row[index]:f}:{index}:{LABELS[index]}".encode()
                    data += struct.pack("<I", len(text)) + text
        else:
            array = (
                np.asarray(prediction["probabilities"], np.float32)
                if output.name == "probabilities"
                else prediction["poses"]
            )
            response.outputs.add(name=output.name, datatype="FP32", shape=array.shape)
            data = array.tobytes()
        response.raw_output_contents.append(data)
    return response


@pytest.mark.parametrize("outputs", SELECTIONS, ids=str)
@pytest.mark.parametrize("images", [1, 3, 40, 5000])
@pytest.mark.parametrize("identifier", ["", "7", "größe" * 100])
def test_an_answers_bytes_are_those_of_the_plain_message(
    identifier: str, images: int, outputs: tuple[Output, ...]
) -> None:
    prediction = _prediction(images, seed=images)
    expected = _plain(identifier, outputs, prediction)
    assert MESSAGES.encode(identifier, Wanted(outputs), prediction) == expected.SerializeToString()
    streamed = pb.ModelStreamInferResponse.FromString(
        MESSAGES.encode_for_stream(identifier, Wanted(outputs), prediction)
    )
    expected.parameters["triton_final_response"].bool_param = True
    assert streamed == pb.ModelStreamInferResponse(infer_response=expected)


def test_a_part_of_a_larger_batch_is_answered_as_it_would_be_alone() -> None:
    whole = _prediction(9)
    part = Share(whole.batch, 2, 7)
    alone = Share({name: part[name].copy() for name in whole.batch}, 0, len(part))
    wanted = Wanted(SELECTIONS[0])
    assert MESSAGES.encode("", wanted, part) == MESSAGES.encode("", wanted, alone)


def test_the_most_probable_classes_come_first_and_of_equal_ones_the_lower() -> None:
    prediction = _share(np.array([[0.25, 1, 0.5, 0.5]], np.float32), np.zeros((1, 4, 2), np.float32))
    response = pb.ModelInferResponse.FromString(MESSAGES.encode("", Wanted((Output("probabilities", 4),)), prediction))
    (data,) = response.raw_output_contents
    texts = []
    while data:
        (length,) = struct.unpack_from("<I", data)
        texts.append(data[4 : 4 + length].decode())
        data = data[4 + length :]
    assert texts == ["1.000000:1:a:b", "0.500000:2:größe", "0.500000:3:", "0.250000:0:circle"]


def test_a_refusal_in_a_stream_has_the_requests_id() -> None:
    response = pb.ModelStreamInferResponse.FromString(refused("7", "too much"))
    assert (response.error_message, response.infer_response.id) == ("too much", "7")
    assert response.infer_response.parameters["triton_final_response"].bool_param
    assert not response.infer_response.outputs


def test_a_wrong_request_of_a_stream_is_kept_without_what_was_sent() -> None:
    """The frames of its error would keep the request, and the request its error, until a garbage collection."""
    request = pb.ModelInferRequest(raw_input_contents=[bytes(784)])
    request.parameters["priority"].string_param = "x"
    query = streamed_infer_query(Received(request), 784, PerModel(_codec))
    assert isinstance(query, StreamedInferQuery) and isinstance(query.error, InvalidRequest)
    assert (query.error.__traceback__, query.error.__cause__, query.error.__context__) == (None, None, None)
