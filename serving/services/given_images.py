"""The images of a request, to the arrays that a graph takes."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.artifact import Artifact
from serving.errors import InvalidRequest
from serving.repository.classifier import IMAGES
from serving.runtime import Arrays
from serving.services.computation import Computation
from serving.services.decoding import Decoding, Steps, measured
from serving.services.encoded_images import Images
from serving.services.image_messages import ImageReader, check_unprepared
from serving.settings import Settings

#: The settings that limit the images of a request.
Limit = Literal["max_images_per_request", "max_explained_images"]


class GivenImages:
    """The images of a request. They are read once."""

    def __init__(
        self,
        images: Sequence[pb.Image],
        settings: Settings,
        limit: Limit = "max_images_per_request",
        field: str = "images[{}]",
    ) -> None:
        """Wrap the images, of which there may be too many.

        limit: the setting with the most images. field: the name of an image's field, with its index in braces.
        """
        self.size = len(images)
        self._limit_name = limit
        few = limit == "max_explained_images"
        self._limit = settings.max_explained_images if few else settings.max_images_per_request
        # Too many images are not read: a small message may hold millions.
        self.slow = self.size <= self._limit and any(image.encoded for image in images)
        self._images: Sequence[pb.Image] | None = images
        self._settings = settings
        self._field = field

    def decode(self, artifact: Artifact) -> Arrays:
        """Return the images as a model takes them. Raises InvalidRequest."""
        given, shape = self._take(), artifact.image_shape
        pixels = [image.pixels for image in given]
        if set(map(len, pixels)) == {math.prod(shape)}:  # all in one step, in place of one for each
            for index, image in enumerate(given):
                check_unprepared(image, self._field.format(index))
            return {IMAGES: np.frombuffer(b"".join(pixels), np.uint8).reshape(self.size, *shape)}
        reader = ImageReader(artifact, self._settings)
        return {IMAGES: np.stack([reader.read(image, self._field.format(i)) for i, image in enumerate(given)])}

    def decode_slowly(self, artifact: Artifact) -> Decoding:
        """Return the decoding of the images, for a thread. Raises InvalidRequest, as do the steps."""
        given, reader = self._take(), ImageReader(artifact, self._settings)
        field = self._field.partition("[")[0]
        return measured(self._steps(given, reader), reader.measure(given), field, self.size)

    async def decode_for(self, computation: Computation) -> Images:
        """Return the images (B, C, H, W) for the model of a computation, which may take a thread.

        Raises InvalidRequest, and as Decoder.decode.
        """
        artifact = computation.model.artifact
        arrays = await computation.decode(self.decode_slowly(artifact)) if self.slow else self.decode(artifact)
        return np.asarray(arrays[IMAGES], np.uint8)

    def _take(self) -> Sequence[pb.Image]:
        """Return the images. Raises InvalidRequest if there are none or too many."""
        if not 1 <= self.size <= self._limit:
            raise InvalidRequest("images", f"{self.size}; expected 1 to {self._limit} ({self._limit_name})")
        given, self._images = self._images, None
        # They are not kept: an image's file may be a thousand times as large as its pixels, and is not needed again.
        assert given is not None
        return given

    def _steps(self, given: Sequence[pb.Image], reader: ImageReader) -> Steps:
        """Decode the images one after the other."""
        images = np.empty((self.size, *reader.shape), np.uint8)
        for index, image in enumerate(given):
            images[index] = reader.read(image, self._field.format(index))
            yield
        return {IMAGES: images}
