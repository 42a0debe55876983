"""The images of a ModelInferRequest, in each form in which they may come, to the pixels that the network takes."""

import math
import struct
from collections.abc import Generator, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protos.inference import inference_pb2 as pb
from serving.artifact import Artifact
from serving.errors import InvalidRequest
from serving.repository.classifier import IMAGES
from serving.services.decoding import Decoding, Measure, Steps, measured
from serving.services.encoded_images import (
    Images,
    decoding_bytes,
    file_bytes,
    from_encoded,
    from_picture,
    picture_bytes,
)
from serving.services.infer_parameters import (
    MAX_SHOWN_CHARACTERS,
    alternatives,
    refuse_shared_memory,
    value_of,
    whole_number,
)
from serving.services.typed_contents import READING_BYTES, TypedContents
from serving.settings import Settings

#: The data types of images: pixels as bytes; pixels as numbers from 0 to 1 or to 255; and PNG or JPEG files.
UINT8, FP32, BYTES = "UINT8", "FP32", "BYTES"
#: The parameter with the number that stands for a white pixel in FP32, and that with the preparation of files.
PIXEL_MAX, PREPROCESS = "pixel_max", "preprocess"

DATATYPES = (UINT8, FP32, BYTES)
_CONTENTS = {UINT8: "uint_contents", FP32: "fp32_contents", BYTES: "bytes_contents"}
_PIXEL_MAXIMA = (1, 255)
_PREPARATIONS = {"none": False, "auto": True}
_SHOWN_SIZES = 8
_PIECE_NUMBERS = 2**14  # converted at once
_LENGTH_BYTES = 4  # before each element of BYTES in raw contents

_Tensor = pb.ModelInferRequest.InferInputTensor
_Pixels = Generator[None, None, Images]


class Received(NamedTuple):
    """A ModelInferRequest. typed: its images if they came in contents, which the message may lack then, or None."""

    message: pb.ModelInferRequest
    typed: TypedContents | None = None


class _Files(NamedTuple):
    """PNG or JPEG files. field: the name of a file's field, with its index in braces. prepared: of any size."""

    files: list[bytes]
    field: str
    prepared: bool


class TensorReader:
    """The reader of the images of requests for one version of a model."""

    def __init__(self, artifact: Artifact, settings: Settings) -> None:
        self._image_shape = artifact.image_shape
        self._look = artifact.preparation
        self._image_size = math.prod(artifact.image_shape)
        self._max_images = settings.max_images_per_request
        self._max_bytes = settings.max_image_bytes
        self._max_pixels = settings.max_picture_pixels

    def images(self, received: Received) -> Images:
        """Return the images (n, C, H, W) of a request. Raises InvalidRequest."""
        tensor, shape = self._check(received)
        if tensor.datatype == UINT8 and (raw := received.message.raw_input_contents):
            return np.frombuffer(raw[0], np.uint8).reshape(shape)
        steps = self._steps(received, tensor)[0]
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                images: Images = stop.value
                return images

    def decoding(self, received: Received) -> Decoding:
        """Return the decoding of the images of a request, for a thread. Raises InvalidRequest, as do the steps."""
        tensor, shape = self._check(received)
        steps, memory = self._steps(received, tensor)
        field = "raw_input_contents" if received.message.raw_input_contents else "inputs[0].contents"
        if isinstance(memory, int):
            return Decoding(_named(steps), memory, field, shape[0])
        return measured(_named(steps), memory, field, shape[0])

    def _check(self, received: Received) -> tuple[_Tensor, tuple[int, ...]]:
        """Check all of a request's input but the values of its pixels and files, and return it and its shape.

        Raises InvalidRequest.
        """
        request = received.message
        inputs = request.inputs
        if len(inputs) != 1:
            raise InvalidRequest("inputs", f"{len(inputs)} tensors; expected one, {IMAGES!r}")
        tensor = inputs[0]
        if tensor.name != IMAGES:
            raise InvalidRequest("inputs[0].name", f"{tensor.name[:MAX_SHOWN_CHARACTERS]!r}; expected {IMAGES!r}")
        if (datatype := tensor.datatype) not in _CONTENTS:
            text = f"{datatype[:MAX_SHOWN_CHARACTERS]!r}; expected {alternatives(DATATYPES)}"
            raise InvalidRequest("inputs[0].datatype", text)
        shape = tuple(tensor.shape)
        fits = shape[1:] in ((), (1,)) and shape if datatype == BYTES else shape[1:] == self._image_shape
        if not fits or not 1 <= shape[0] <= self._max_images:
            raise InvalidRequest("inputs[0].shape", self._about_shape(shape, datatype))
        if tensor.parameters or request.parameters:
            _check_parameters(request, tensor)
        if request.raw_input_contents:
            self._check_raw(received, tensor, shape[0])
        else:
            self._check_typed(received.typed, datatype, shape[0])
        return tensor, shape

    def _check_raw(self, received: Received, tensor: _Tensor, images: int) -> None:
        """Check the size of the contents that came as bytes. Raises InvalidRequest."""
        raw, typed = received.message.raw_input_contents, received.typed
        # Contents without values do no harm: some clients write them beside raw ones.
        if tensor.HasField("contents") and (typed.kinds if typed else tensor.contents.ListFields()):
            raise InvalidRequest("inputs[0].contents", "came with raw_input_contents; expected one of the two")
        if len(raw) != 1:
            raise InvalidRequest("raw_input_contents", f"{len(raw)}; expected one, for {IMAGES!r}")
        if tensor.datatype != BYTES and len(raw[0]) != self._size(tensor.datatype, images):
            text = f"{len(raw[0])} bytes; expected {self._about_size(tensor.datatype, images)}"
            raise InvalidRequest("raw_input_contents[0]", text)

    def _check_typed(self, typed: TypedContents | None, datatype: str, images: int) -> None:
        """Check the number and kind of the values that came in contents. Raises InvalidRequest."""
        wanted = _CONTENTS[datatype]
        if typed is None or not typed.kinds:
            size = "" if datatype == BYTES else f" of {self._size(datatype, images)} bytes,"
            raise InvalidRequest("raw_input_contents", f"none; expected one,{size} for {IMAGES!r}")
        for kind in typed.kinds:
            if kind != wanted:
                raise InvalidRequest(f"inputs[0].contents.{kind}", f"not for {datatype}; expected {wanted}")
        if datatype == BYTES:
            return
        if (count := typed.count if datatype == UINT8 else typed.float_count) != images * self._image_size:
            text = f"{count} values; expected {self._about_size(UINT8, images)}"
            raise InvalidRequest(f"inputs[0].contents.{wanted}", text)

    def _steps(self, received: Received, tensor: _Tensor) -> tuple[_Pixels, int | Measure]:
        """Return the steps to the images of a checked request, and the most memory that they take, or the steps to it.

        Raises InvalidRequest, as do the steps.
        """
        message, typed = received
        raw = message.raw_input_contents[0] if message.raw_input_contents else None
        shape = (tensor.shape[0], *self._image_shape)
        memory = shape[0] * self._image_size + READING_BYTES
        if tensor.datatype == BYTES:
            files = _files(message, tensor, raw, typed)
            return self._decode(files), self._measure(files)
        if tensor.datatype == FP32:
            maximum = _pixel_max(message, tensor)
            if raw is not None:
                return _from_floats(_pieces(raw), shape, maximum, "raw_input_contents[0]"), memory
            assert typed
            return _from_floats(typed.floats(), shape, maximum, "inputs[0].contents.fp32_contents"), memory
        return _reshaped(raw, typed, shape), memory

    def _measure(self, given: _Files) -> Measure:
        """Yield after each file, and return the most memory that decoding them takes, one after the other."""
        largest = 0
        for file in given.files:
            if len(file) <= self._max_bytes:
                work = picture_bytes(file, self._max_pixels) if given.prepared else file_bytes(file)
                largest = max(largest, work)
            yield
        return decoding_bytes(self._image_shape, len(given.files)) + largest

    def _decode(self, given: _Files) -> _Pixels:
        """Decode files one after the other."""
        images = np.empty((len(given.files), *self._image_shape), np.uint8)
        for index, file in enumerate(given.files):
            field, shape = given.field.format(index), self._image_shape
            if given.prepared:
                images[index] = from_picture(file, shape, self._look, field, self._max_bytes, self._max_pixels)
            else:
                images[index] = from_encoded(file, shape, field, self._max_bytes)
            yield
        return images

    def _about_shape(self, shape: tuple[int, ...], datatype: str) -> str:
        sizes = ", ".join(map(str, shape[:_SHOWN_SIZES])) + (", ..." if len(shape) > _SHOWN_SIZES else "")
        expected = "[n] or [n, 1]" if datatype == BYTES else f"[n, {', '.join(map(str, self._image_shape))}]"
        return f"[{sizes}]; expected {expected}, n from 1 to {self._max_images} (max_images_per_request)"

    def _size(self, datatype: str, images: int) -> int:
        return images * self._image_size * (4 if datatype == FP32 else 1)

    def _about_size(self, datatype: str, images: int) -> str:
        each = ", 4 bytes each" if datatype == FP32 else ""
        return f"{self._size(datatype, images)} ({images} x {' x '.join(map(str, self._image_shape))}{each})"


def _check_parameters(request: pb.ModelInferRequest, tensor: _Tensor) -> None:
    """Check the parameters of a request's images. Raises InvalidRequest."""
    refuse_shared_memory(tensor.parameters, "inputs[0]")
    _pixel_max(request, tensor)
    _prepared(request, tensor)


def _parameter(request: pb.ModelInferRequest, tensor: _Tensor, name: str) -> tuple[pb.InferParameter | None, str]:
    """Return a parameter of the input, or else of the request, or None; and the name of its field."""
    for parameters, place in ((tensor.parameters, "inputs[0]."), (request.parameters, "")):
        if name in parameters:
            return parameters[name], f'{place}parameters["{name}"]'
    return None, ""


def _pixel_max(request: pb.ModelInferRequest, tensor: _Tensor) -> int:
    """Return the number that stands for a white pixel. Raises InvalidRequest."""
    parameter, field = _parameter(request, tensor, PIXEL_MAX)
    if parameter is None:
        return _PIXEL_MAXIMA[0]
    value = value_of(parameter)
    maximum = int(value) if isinstance(value, float) and value.is_integer() else whole_number(parameter, field)
    if maximum not in _PIXEL_MAXIMA:
        raise InvalidRequest(field, f"{maximum}; expected 1 or 255")
    if maximum == 1 and tensor.datatype != FP32:
        raise InvalidRequest(field, f"1 for {tensor.datatype!r}; expected with 'FP32' alone")
    return maximum


def _prepared(request: pb.ModelInferRequest, tensor: _Tensor) -> bool:
    """Return True if files of any size are prepared for the model. Raises InvalidRequest."""
    parameter, field = _parameter(request, tensor, PREPROCESS)
    if parameter is None:
        return False
    value = str(value_of(parameter))
    if value not in _PREPARATIONS:
        raise InvalidRequest(field, f"{value[:MAX_SHOWN_CHARACTERS]!r}; expected 'none' or 'auto', in string_param")
    if _PREPARATIONS[value] and tensor.datatype != BYTES:
        raise InvalidRequest(field, f"{value!r} for {tensor.datatype!r}; expected with 'BYTES' alone")
    return _PREPARATIONS[value]


def _files(message: pb.ModelInferRequest, tensor: _Tensor, raw: bytes | None, typed: TypedContents | None) -> _Files:
    """Return the files of a request. Raises InvalidRequest."""
    images, prepared = tensor.shape[0], _prepared(message, tensor)
    if raw is not None:
        return _Files(_elements(raw, images), "raw_input_contents[0][{}]", prepared)
    assert typed
    field = "inputs[0].contents.bytes_contents"
    if len(files := typed.elements) != images:
        raise InvalidRequest(field, f"{len(files)} files; expected {images}")
    return _Files(files, field + "[{}]", prepared)


def _elements(raw: bytes, count: int) -> list[bytes]:
    """Return the elements of BYTES in raw contents, each after its length. Raises InvalidRequest."""
    elements: list[bytes] = []
    at = 0
    while at < len(raw) and len(elements) < count:
        if at + _LENGTH_BYTES > len(raw):
            break
        (size,) = struct.unpack_from("<I", raw, at)
        begin = at + _LENGTH_BYTES
        if begin + size > len(raw):
            break
        elements.append(raw[begin : begin + size])
        at = begin + size
    if len(elements) != count or at != len(raw):
        raise InvalidRequest(
            "raw_input_contents[0]",
            f"{len(raw)} bytes that are not {count} files; expected each file after its length, 4 bytes, lowest first",
        )
    return elements


def _pieces(raw: bytes) -> Iterable[NDArray[np.float32]]:
    numbers = np.frombuffer(raw, "<f4")
    return (numbers[at : at + _PIECE_NUMBERS] for at in range(0, len(numbers), _PIECE_NUMBERS))


def _from_floats(pieces: Iterable[NDArray[np.float32]], shape: tuple[int, ...], maximum: int, field: str) -> _Pixels:
    """Yield after each piece of pixels from 0 to ``maximum``, and return them as bytes, rounded to the nearest one.

    Raises InvalidRequest for a number that is not finite or out of range.
    """
    pixels, filled = np.empty(math.prod(shape), np.uint8), 0
    for piece in pieces:
        right = (piece >= 0) & (piece <= maximum)
        if not right.all():
            index = int(right.argmin())
            hint = "" if maximum == _PIXEL_MAXIMA[-1] else f', or up to 255 with the parameter "{PIXEL_MAX}" of 255'
            text = f"{piece[index]:g}; expected 0 to {maximum}{hint}"
            raise InvalidRequest(f"{field}[{filled + index}]", text)
        pixels[filled : filled + len(piece)] = np.rint(piece if maximum == 255 else piece * np.float32(255))
        filled += len(piece)
        yield
    return pixels.reshape(shape)


def _reshaped(raw: bytes | None, typed: TypedContents | None, shape: tuple[int, ...]) -> _Pixels:
    """Return pixels that came as bytes, or as whole numbers."""
    if raw is not None:
        return np.frombuffer(raw, np.uint8).reshape(shape)
    assert typed
    return (yield from typed.steps()).reshape(shape)


def _named(pixels: _Pixels) -> Steps:
    """Return the steps to the graph's inputs."""
    return {IMAGES: (yield from pixels)}
