"""Messages of one image to the pixels that a model takes."""

from collections.abc import Iterable

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.artifact import Artifact
from serving.errors import InvalidRequest
from serving.services.decoding import Measure
from serving.services.encoded_images import (
    Images,
    decoding_bytes,
    file_bytes,
    from_encoded,
    from_picture,
    from_pixels,
    picture_bytes,
)
from serving.settings import Settings

_AS_IT_IS = (pb.PREPROCESS_UNSPECIFIED, pb.PREPROCESS_NONE)


def check_unprepared(image: pb.Image, field: str) -> None:
    """Check that nothing asks to prepare raw pixels. field: of the image. Raises InvalidRequest."""
    if image.preprocess in _AS_IT_IS:
        return
    _check_known(image, field)
    raise InvalidRequest(
        f"{field}.preprocess",
        "PREPROCESS_AUTO for raw pixels; expected PREPROCESS_NONE, or a PNG or JPEG file in encoded",
    )


class ImageReader:
    """A reader of images for one model.

    shape: (C, H, W) of the model's images.
    """

    def __init__(self, artifact: Artifact, settings: Settings) -> None:
        self.shape = artifact.image_shape
        self._look = artifact.preparation
        self._max_bytes = settings.max_image_bytes
        self._max_pixels = settings.max_picture_pixels

    def measure(self, images: Iterable[pb.Image]) -> Measure:
        """Yield after each image, and return the most memory that reading them takes, one after the other."""
        count = largest = 0
        for image in images:
            count += 1
            if len(file := image.encoded) <= self._max_bytes:
                prepared = image.preprocess == pb.PREPROCESS_AUTO
                largest = max(largest, picture_bytes(file, self._max_pixels) if prepared else file_bytes(file))
            yield
        return decoding_bytes(self.shape, count) + largest

    def read(self, image: pb.Image, field: str) -> Images:
        """Return the pixels of an image, (C, H, W) uint8. field: of the image. Raises InvalidRequest."""
        match image.WhichOneof("content"):
            case "pixels":
                check_unprepared(image, field)
                return from_pixels(image.pixels, self.shape, f"{field}.pixels")
            case "encoded":
                _check_known(image, field)
                named = f"{field}.encoded"
                if image.preprocess == pb.PREPROCESS_AUTO:
                    return from_picture(image.encoded, self.shape, self._look, named, self._max_bytes, self._max_pixels)
                return from_encoded(image.encoded, self.shape, named, self._max_bytes)
            case _:
                raise InvalidRequest(field, "has no content; expected pixels or encoded")


def _check_known(image: pb.Image, field: str) -> None:
    if image.preprocess not in pb.Preprocess.values():
        raise InvalidRequest(
            f"{field}.preprocess", f"{image.preprocess}; expected one of {', '.join(pb.Preprocess.keys())}"
        )
