"""The images of a request, to the arrays that a graph takes."""

import math
from collections.abc import Sequence

import numpy as np

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.errors import InvalidRequest
from serving.repository.classifier import IMAGES
from serving.runtime import Arrays
from serving.services.computation import Computation
from serving.services.decoding import Decoding, Steps
from serving.services.encoded_images import Images, Shape, decoding_bytes, from_encoded, from_pixels


class GivenImages:
    """The images of a request. They are read once."""

    def __init__(
        self,
        images: Sequence[pb.Image],
        limit: int,
        max_image_bytes: int,
        limit_name: str = "max_images_per_request",
        field: str = "images[{}]",
    ) -> None:
        """Wrap the images, of which there may be too many.

        limit, limit_name: the most images, and the setting with this limit. max_image_bytes: the largest file. field:
        the name of an image's field, with its index in braces.
        """
        self.size = len(images)
        # Too many images are not read: a small message may hold millions.
        self.slow = self.size <= limit and any(image.encoded for image in images)
        self._images: Sequence[pb.Image] | None = images
        self._limit = limit
        self._limit_name = limit_name
        self._max_image_bytes = max_image_bytes
        self._field = field

    def decode(self, shape: Shape) -> Arrays:
        """Return the images, all of the shape (C, H, W). Raises InvalidRequest."""
        given = self._take()
        pixels = [image.pixels for image in given]
        if set(map(len, pixels)) == {math.prod(shape)}:  # all in one step, in place of one for each
            return {IMAGES: np.frombuffer(b"".join(pixels), np.uint8).reshape(self.size, *shape)}
        return {IMAGES: np.stack([self._decode_image(image, index, shape) for index, image in enumerate(given)])}

    def decode_slowly(self, shape: Shape) -> Decoding:
        """Return the decoding of the images, for a thread. Raises InvalidRequest, as do the steps."""
        steps = self._steps(self._take(), shape)
        return Decoding(steps, decoding_bytes(shape, self.size), self._field.partition("[")[0], self.size)

    async def decode_for(self, computation: Computation) -> Images:
        """Return the images (B, C, H, W) for the model of a computation, which may take a thread.

        Raises InvalidRequest, and as Decoder.decode.
        """
        shape = computation.model.artifact.image_shape
        arrays = await computation.decode(self.decode_slowly(shape)) if self.slow else self.decode(shape)
        return np.asarray(arrays[IMAGES], np.uint8)

    def _take(self) -> Sequence[pb.Image]:
        """Return the images. Raises InvalidRequest if there are none or too many."""
        if not 1 <= self.size <= self._limit:
            raise InvalidRequest("images", f"{self.size}; expected 1 to {self._limit} ({self._limit_name})")
        given, self._images = self._images, None
        # They are not kept: an image's file may be a thousand times as large as its pixels, and is not needed again.
        assert given is not None
        return given

    def _steps(self, given: Sequence[pb.Image], shape: Shape) -> Steps:
        """Decode the images one after the other."""
        images = np.empty((self.size, *shape), np.uint8)
        for index, image in enumerate(given):
            images[index] = self._decode_image(image, index, shape)
            yield
        return {IMAGES: images}

    def _decode_image(self, image: pb.Image, index: int, shape: Shape) -> Images:
        """Return the pixels (C, H, W) of an image. Raises InvalidRequest."""
        field = self._field.format(index)
        match image.WhichOneof("content"):
            case "pixels":
                return from_pixels(image.pixels, shape, f"{field}.pixels")
            case "encoded":
                return from_encoded(image.encoded, shape, f"{field}.encoded", self._max_image_bytes)
            case _:
                raise InvalidRequest(field, "has no content; expected pixels or encoded")
