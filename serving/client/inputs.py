"""Conversion of arrays, files and their bytes to the images of a request."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, Self

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray
from PIL import Image

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.client.arrays import array_of, array_of_names, is_array, is_nested, to_uint8
from serving.client.errors import InvalidImage, InvalidRequest, ItemError, ShapeError, brief
from serving.client.pictures import file_to_send, is_known_to_server, pixels_of
from serving.client.results import Model
from serving.client.sources import FORMAT_NAMES, MAGICS, is_file, named, parse, read_file, read_path


class ArrayLike(Protocol):
    """An array of another library."""

    def __array__(self) -> NDArray[Any]: ...


class Readable(Protocol):
    """An open file."""

    def read(self) -> Any: ...


#: An array of uint8 from 0 to 255, or of floats from 0 to 1, (H, W), (C, H, W), (n, H, W) or (n, C, H, W), of NumPy or
#: any other library; an image file by path, as bytes or opened; or an image that Pillow has opened, which is read as
#: its file would be.
Item = NDArray[Any] | ArrayLike | bytes | str | os.PathLike[str] | Readable | Image.Image
Images = Item | Iterable[Item]
#: An array, the bytes of a PNG or JPEG file, an image that Pillow has opened, or one that is ready to be sent.
Content = NDArray[Any] | bytes | pb.Image | Image.Image
#: The preparation of pictures by the server: none, or as the training images were.
Preprocess = Literal["none", "auto"]

_MAX_MAGIC_BYTES = max(map(len, MAGICS))
_EXPECTED_ITEM = f"an array, or the path or bytes of an image file ({FORMAT_NAMES})"


class Fitting(NamedTuple):
    """The way in which files and opened images get the model's size.

    resize: they are scaled here. auto: the server prepares them. Neither: they have it.
    """

    resize: bool = False
    auto: bool = False

    @classmethod
    def of(cls, resize: bool, preprocess: Preprocess) -> Self:
        """Check the options of a call. Raises InvalidRequest."""
        if preprocess not in ("none", "auto"):
            raise InvalidRequest(f"preprocess: {preprocess!r}; expected 'none' or 'auto'", field="preprocess")
        if resize and preprocess == "auto":
            raise InvalidRequest("resize and preprocess='auto': both; expected one, since 'auto' takes any size")
        return cls(resize, preprocess == "auto")


def items_of(images: Images) -> Iterable[Item]:
    """Return the items of an input, which may itself be an item. Raises InvalidImage for any other object."""
    if (listed := array_of_names(images)) is not None:
        return listed
    is_item = isinstance(images, str | os.PathLike | Image.Image) or is_array(images) or is_nested(images)
    if is_item or _is_buffer(images) or is_file(images):
        return (images,)  # type: ignore[return-value]
    if isinstance(images, bytes | Mapping) or not isinstance(images, Iterable):
        raise InvalidImage(f"images: {type(images).__name__}; expected {_EXPECTED_ITEM}, or an iterable of these")
    return images


def read(item: Item | pb.Image) -> Content:
    """Read an item's file, if it names or holds one, and return its content. Raises ItemError, and nothing else.

    An IDX file becomes an array (n, 1, H, W) or (n, C, H, W).
    """
    try:
        return _read(item)
    except ItemError:
        raise
    except Exception as error:  # the item may be an object of any library
        raise ItemError(f"{type(item).__name__}; it cannot be read ({brief(str(error))})") from error


def _read(item: Item | pb.Image) -> Content:
    if isinstance(item, str | os.PathLike):
        data = read_path(item)
        try:
            return parse(data)
        except ItemError as error:
            raise ItemError(f"{named(os.fspath(item))}: {error}") from error.__cause__
    if isinstance(item, pb.Image | Image.Image):
        return item
    if is_array(item):
        return _array_or_file(array_of(item))
    if _is_buffer(item):
        with memoryview(item) as view:  # type: ignore[arg-type]
            return parse(view.tobytes()) if (view.ndim, view.itemsize) == (1, 1) else np.array(view)
    if is_nested(item):
        return array_of(item)
    if is_file(item):
        return parse(read_file(item))
    raise ItemError(f"{type(item).__name__}; expected {_EXPECTED_ITEM}")


def _array_or_file(array: NDArray[Any]) -> Content:
    """Return an array, or the content of the file whose bytes it holds, as ``numpy.fromfile`` gives them."""
    is_flat = array.ndim == 1 and array.dtype == np.uint8
    return parse(array.tobytes()) if is_flat and array[:_MAX_MAGIC_BYTES].tobytes().startswith(MAGICS) else array


def messages(content: Content, model: Model, fitting: Fitting) -> Iterator[pb.Image]:
    """Return a content, as ``read`` gives it, as images of a request. Raises ItemError before the first image.

    PNG and JPEG files are sent unchanged, but shrunk if they are large and the server prepares them. To be resized,
    they are decoded here, as are files of other formats. Arrays are sent as they are.
    """
    if isinstance(content, pb.Image):
        return iter((content,))
    if not isinstance(content, bytes | Image.Image):
        return _pixels(_stacked(content, model))
    if fitting.auto:
        return iter((pb.Image(encoded=file_to_send(content), preprocess=pb.PREPROCESS_AUTO),))
    if isinstance(content, Image.Image) or fitting.resize or not is_known_to_server(content):
        return _pixels(pixels_of(content, model, fitting.resize)[np.newaxis])
    return iter((pb.Image(encoded=content),))


def blocks(item: Item | pb.Image, fitting: Fitting) -> bool:
    """Return True if reading an item takes so long that an event loop must not wait for it."""
    if isinstance(item, bytes | bytearray | memoryview):
        return fitting.resize or fitting.auto or not is_known_to_server(bytes(item))
    return isinstance(item, str | os.PathLike) or is_file(item) or (fitting.auto and isinstance(item, Image.Image))


def located(error: ItemError, index: int | None) -> InvalidImage:
    """Return the exception to raise. index: the number of the image in the call's input; None for its only one."""
    field = "image" if index is None else f"images[{index}]"
    result = InvalidImage(f"{field}: {error}", field=field, index=index)
    result.__cause__ = error.__cause__
    return result


def only_image(images: Iterable[pb.Image], limits: "RequestLimits") -> pb.Image:
    """Return the image of an item that holds one. Raises ItemError for none, for several, and for one too large."""
    given = list(images)
    if len(given) != 1:
        raise ItemError(f"{len(given)} images; expected one")
    limits.check(given[0])
    return given[0]


@dataclass(frozen=True)
class RequestLimits:
    """The limits of one request.

    images: the most images. bytes: the largest request, in bytes. overhead: bytes of a request without images.
    """

    images: int
    bytes: int
    overhead: int

    @classmethod
    def of(cls, model: Model, request: Message) -> "RequestLimits":
        """Return the limits of a request that is complete but for its images."""
        # A stream's message adds its id and lengths: less than 64 bytes.
        return cls(max(1, model.max_images_per_request), model.max_request_bytes, request.ByteSize() + 64)

    def check(self, image: pb.Image) -> int:
        """Return the bytes that an image takes in a request. Raises ItemError if no request can hold it."""
        size = _size(image)
        if self.overhead + size > self.bytes:
            raise ItemError(f"{size} bytes; the server takes requests of up to {self.bytes} bytes (max_request_bytes)")
        return size

    def hold(self, images: int, size: int) -> bool:
        """Return True if one request can hold this number of images, of ``size`` bytes in all."""
        return images <= self.images and self.overhead + size <= self.bytes

    def hold_all(self, images: Sequence[pb.Image]) -> bool:
        """Return True if one request can hold these images."""
        return self.hold(len(images), sum(map(_size, images)))


def _size(image: pb.Image) -> int:
    content = image.ByteSize()
    return content + 1 + max(1, (content.bit_length() + 6) // 7)  # its tag and its length


def _is_buffer(item: object) -> bool:
    """Return True for bytes, and for other objects whose memory holds bytes: arrays of ctypes, mapped files."""
    if isinstance(item, bytes | bytearray | memoryview):
        return True
    try:
        with memoryview(item):  # type: ignore[arg-type]
            return True
    except TypeError:
        return False


def _pixels(images: NDArray[np.uint8]) -> Iterator[pb.Image]:
    return (pb.Image(pixels=image.tobytes()) for image in images)


def _stacked(array: NDArray[Any], model: Model) -> NDArray[np.uint8]:
    """Return an array as (n, C, H, W) uint8. Raises ItemError for another type, ShapeError for another shape."""
    array = to_uint8(array)
    channels, height, width = shape = model.image_shape
    if array.ndim == 4 and array.shape[1:] == shape:
        return array
    if array.shape == shape:
        return array[np.newaxis]
    if channels == 1 and array.ndim in (2, 3) and array.shape[-2:] == (height, width):
        return array.reshape(-1, *shape)
    one = f"{(height, width)} or {shape}" if channels == 1 else f"{shape}"
    several = f"(n, {height}, {width}) or " if channels == 1 else ""
    last = array.ndim >= 3 and array.shape[-3:] == (height, width, channels)
    hint = "; its channels come last: numpy.moveaxis(images, -1, -3) puts them first" if last else ""
    raise ShapeError(
        f"an array of shape {array.shape}; {model.name} takes {one} for one image and "
        f"{several}(n, {channels}, {height}, {width}) for several{hint}"
    )
