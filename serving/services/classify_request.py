"""Requests of raw pixels read straight from bytes: by way of messages, each takes several times as long.

Only bytes that can mean nothing else are read here, as protobuf itself writes them; all others are left to protobuf.
"""

import math

import numpy as np

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.services.encoded_images import Images
from serving.services.protobuf_wire import BYTES, tag, varint

_ID = tag(pb.ClassifyStreamRequest.ID_FIELD_NUMBER, BYTES)
_REQUEST = tag(pb.ClassifyStreamRequest.REQUEST_FIELD_NUMBER, BYTES)
_IMAGE = tag(pb.ClassifyRequest.IMAGES_FIELD_NUMBER, BYTES)
_PIXELS = tag(pb.Image.PIXELS_FIELD_NUMBER, BYTES)
_ONE_BYTE = 0x80  # lengths below it take one


class PixelReader:
    """Reads requests that name no model; image_shape: of the model that they are for. max_images: in one request."""

    def __init__(self, image_shape: tuple[int, int, int], max_images: int) -> None:
        self._shape = image_shape
        self._max_images = max_images
        size = math.prod(image_shape)
        before_pixels = _PIXELS + varint(size)
        #: What comes before each image's pixels.
        self._head = _IMAGE + varint(len(before_pixels) + size) + before_pixels
        self._head_array = np.frombuffer(self._head, np.uint8)
        self._width = len(self._head) + size

    def read(self, data: bytes, start: int = 0) -> Images | None:
        """The images (n, C, H, W) of the ``ClassifyRequest`` that begins there; None if it is not one of these."""
        count, rest = divmod(len(data) - start, self._width)
        if rest or not data.startswith(self._head, start) or count > self._max_images:
            return None
        if count == 1:
            return np.frombuffer(data, np.uint8, offset=start + len(self._head)).reshape(1, *self._shape)
        rows = np.frombuffer(data, np.uint8, offset=start).reshape(count, self._width)
        if (rows[:, : len(self._head)] != self._head_array).any():
            return None
        return np.ascontiguousarray(rows[:, len(self._head) :]).reshape(count, *self._shape)

    def read_of_stream(self, data: bytes) -> tuple[str, Images] | None:
        """The id and the images of a ``ClassifyStreamRequest``; None if it is not one of these."""
        identifier, start = "", 0
        if data.startswith(_ID) and len(data) > 1 and data[1] < _ONE_BYTE:
            start = 2 + data[1]
            try:
                identifier = data[2:start].decode()
            except UnicodeDecodeError:
                return None
        size = (len(data) - start) // self._width * self._width
        if size <= 0:
            return None
        head = _REQUEST + varint(size)
        if not data.startswith(head, start) or len(data) != start + len(head) + size:
            return None
        images = self.read(data, start + len(head))
        return None if images is None else (identifier, images)
