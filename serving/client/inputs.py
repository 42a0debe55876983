"""Conversion of arrays, files and their bytes to the images of a request."""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray
from PIL import Image

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.client.errors import InvalidImage
from serving.client.results import Model
from serving.files.idx import GZIP_MAGIC, is_idx, read_idx
from serving.files.image_headers import BadImage, read_header
from serving.files.images import to_pixels
from serving.files.preparation import shrink

#: One array of uint8, (H, W), (C, H, W), (n, H, W) or (n, C, H, W), or a PNG, JPEG or IDX file, by path or as bytes;
#: or an image that Pillow has opened, which is read as its file would be.
Item = NDArray[Any] | bytes | str | os.PathLike[str] | Image.Image
Images = Item | Iterable[Item]
#: An array, the bytes of a PNG or JPEG file, an image that Pillow has opened, or one that is ready to be sent.
Content = NDArray[Any] | bytes | pb.Image | Image.Image
#: The preparation of pictures by the server: none, or as the training images were.
Preprocess = Literal["none", "auto"]

# Larger pictures are shrunk before the server prepares them, which needs no more.
_MAX_PICTURE_BYTES = 2**18
_MAX_PICTURE_PIXELS = 2**20
_JPEG_QUALITY = 90
_EXPECTED_ITEM = "an array, or the path or bytes of a PNG, JPEG or IDX file"


class ItemError(ValueError):
    """An item holds no image. The text says what came and what was expected, but not which item it was."""


class ShapeError(ItemError):
    """An array does not have the shape that the model takes."""


class Fitting(NamedTuple):
    """The way in which files and opened images get the model's size.

    resize: they are scaled here. auto: the server prepares them. Neither: they have it.
    """

    resize: bool = False
    auto: bool = False

    @classmethod
    def of(cls, resize: bool, preprocess: Preprocess) -> Self:
        """Check the options of a call. Raises ValueError."""
        if preprocess not in ("none", "auto"):
            raise ValueError(f"preprocess: {preprocess!r}; expected 'none' or 'auto'")
        if resize and preprocess == "auto":
            raise ValueError("resize and preprocess='auto': both; expected one, since 'auto' takes any size")
        return cls(resize, preprocess == "auto")


def items_of(images: Images) -> Iterable[Item]:
    """Return the items of an input, which may itself be an item. Raises InvalidImage for any other object."""
    if isinstance(images, str | bytes | bytearray | memoryview | os.PathLike) or _is_array(images):
        return (images,)  # type: ignore[return-value]
    if not isinstance(images, Iterable):
        raise InvalidImage(f"images: {type(images).__name__}; expected {_EXPECTED_ITEM}, or an iterable of these")
    return images


def read(item: Item | pb.Image) -> Content:
    """Read an item's file, if it names or holds one, and return its content. Raises ItemError.

    An IDX file becomes an array (n, 1, H, W) or (n, C, H, W).
    """
    if isinstance(item, str | os.PathLike):
        try:
            return parse(Path(item).read_bytes())
        except OSError as error:
            raise ItemError(f"{os.fspath(item)}: {error.strerror}") from error
        except ItemError as error:
            raise ItemError(f"{os.fspath(item)}: {error}") from error.__cause__
        except ValueError as error:  # a path with a null character
            raise ItemError(f"{os.fspath(item)!r}: {error}") from error
    if isinstance(item, bytes | bytearray | memoryview):
        return parse(bytes(item))
    if isinstance(item, pb.Image | Image.Image):
        return item
    if _is_array(item):
        return np.asarray(item)
    raise ItemError(f"{type(item).__name__}; expected {_EXPECTED_ITEM}")


def parse(data: bytes) -> bytes | NDArray[np.uint8]:
    """Return the content of a file: an array for an IDX file, else the bytes unchanged. Raises ItemError."""
    if not (is_idx(data[:4]) or data.startswith(GZIP_MAGIC)):
        return data
    try:
        images = read_idx(data)
    except ValueError as error:
        raise ItemError(str(error)) from error
    if images.ndim < 3:
        raise ItemError("an IDX file of labels or single values; expected one of images")
    return images[:, np.newaxis] if images.ndim == 3 else images


def messages(content: Content, model: Model, fitting: Fitting) -> Iterator[pb.Image]:
    """Return a content, as ``read`` gives it, as images of a request. Raises ItemError before the first image.

    PNG and JPEG files are sent unchanged, but shrunk if they are large and the server prepares them. To be resized,
    they are decoded here. Arrays are sent as they are.
    """
    if isinstance(content, pb.Image):
        return iter((content,))
    if not isinstance(content, bytes | Image.Image):
        return _pixels(_stacked(content, model))
    if fitting.auto:
        return iter((pb.Image(encoded=_picture(content), preprocess=pb.PREPROCESS_AUTO),))
    if isinstance(content, Image.Image):
        return _pixels(_opened(content, model, fitting.resize)[np.newaxis])
    if fitting.resize:
        return _pixels(_scaled(content, model)[np.newaxis])
    return iter((pb.Image(encoded=content),))


def blocks(item: Item | pb.Image, fitting: Fitting) -> bool:
    """Return True if reading an item takes so long that an event loop must not wait for it."""
    if isinstance(item, bytes | bytearray | memoryview):
        return fitting.resize or fitting.auto
    return isinstance(item, str | os.PathLike) or (fitting.auto and isinstance(item, Image.Image))


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


def _is_array(item: object) -> bool:
    """Return True for a NumPy array and for any object that NumPy can convert: CPU tensors, Pillow's images."""
    return isinstance(item, np.ndarray) or hasattr(item, "__array__") or hasattr(item, "__array_interface__")


def _pixels(images: NDArray[np.uint8]) -> Iterator[pb.Image]:
    return (pb.Image(pixels=image.tobytes()) for image in images)


def _stacked(array: NDArray[Any], model: Model) -> NDArray[np.uint8]:
    """Return an array as (n, C, H, W) uint8. Raises ItemError for another type, ShapeError for another shape."""
    if array.dtype != np.uint8:
        hint = "; for values from 0 to 1: (255 * images).round().astype(numpy.uint8)" if array.dtype.kind == "f" else ""
        raise ItemError(f"an array of {array.dtype}; expected uint8, from 0 to 255{hint}")
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


def _opened(image: Image.Image, model: Model, resize: bool) -> NDArray[np.uint8]:
    """Return an image that Pillow has opened as its file would be read, (C, H, W). Raises ItemError."""
    channels, height, width = model.image_shape
    try:
        pixels = to_pixels(image, channels, (width, height) if resize else None)
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise ItemError("not an image, or a damaged one") from error
    if pixels.shape != model.image_shape:
        size = f"{pixels.shape[2]} x {pixels.shape[1]}"
        raise ShapeError(f"an image of {size} pixels; {model.name} takes {width} x {height} (resize=True scales it)")
    return pixels


def _scaled(data: bytes, model: Model) -> NDArray[np.uint8]:
    """Decode an image file and scale it to the model's size: (C, H, W) uint8. Raises ItemError."""
    channels, height, width = model.image_shape
    try:
        with Image.open(io.BytesIO(data)) as image:
            return to_pixels(image, channels, (width, height))
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        raise ItemError("not an image, or a damaged one") from error


def _picture(content: bytes | Image.Image) -> bytes:
    """Return a picture as a PNG or JPEG file that is not too large to be sent. Raises ItemError."""
    if isinstance(content, bytes) and _is_small(content):
        return content
    try:
        if isinstance(content, Image.Image):
            return _file_of(content.copy())
        with Image.open(io.BytesIO(content)) as image:
            return _file_of(image)
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        raise ItemError("not an image, or a damaged one") from error


def _is_small(data: bytes) -> bool:
    """Return True for a PNG or JPEG file that can be sent as it is."""
    try:
        header = read_header(data)
    except BadImage:
        return False
    return len(data) <= _MAX_PICTURE_BYTES and header.width * header.height <= _MAX_PICTURE_PIXELS


def _file_of(image: Image.Image) -> bytes:
    """Return a shrunk picture as a file: JPEG, or or PNG if it has transparent parts or few pixels."""
    small, file = shrink(image), io.BytesIO()
    lossless = small.mode == "RGBA" or small.width * small.height * len(small.getbands()) <= _MAX_PICTURE_BYTES
    small.save(file, "PNG" if lossless else "JPEG", **({} if lossless else {"quality": _JPEG_QUALITY}))
    return file.getvalue()
