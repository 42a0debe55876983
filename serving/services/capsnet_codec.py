"""The messages of ``capsnet.v1`` for classification, read and written as bytes without protobuf's classes.

Only bytes with a single possible meaning are read here, in the form in which protobuf writes them. Protobuf reads all
others. Answers have the bytes of protobuf's own encoding, with one exception: a probability or component of exactly 0
is written here, and omitted there.
"""

import math
from itertools import groupby

import numpy as np

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.artifact import Artifact
from serving.batching.ticket import Share
from serving.repository.classifier import POSES, PROBABILITIES
from serving.services.encoded_images import Images
from serving.services.protobuf_wire import BYTES, FIXED32, VARINT, delimited, tag, varint

_ID = tag(pb.ClassifyStreamRequest.ID_FIELD_NUMBER, BYTES)
_REQUEST = tag(pb.ClassifyStreamRequest.REQUEST_FIELD_NUMBER, BYTES)
_IMAGE = tag(pb.ClassifyRequest.IMAGES_FIELD_NUMBER, BYTES)
_PIXELS = tag(pb.Image.PIXELS_FIELD_NUMBER, BYTES)
_ONE_BYTE = 0x80  # lengths below it take one byte


class PixelReader:
    """The reader of requests of raw pixels that name no model."""

    def __init__(self, image_shape: tuple[int, int, int], max_images: int) -> None:
        """Prepare a reader. image_shape: (C, H, W) of the images. max_images: the most images in one request."""
        self._shape = image_shape
        self._max_images = max_images
        size = math.prod(image_shape)
        before_pixels = _PIXELS + varint(size)
        #: The bytes before each image's pixels.
        self._head = _IMAGE + varint(len(before_pixels) + size) + before_pixels
        self._head_array = np.frombuffer(self._head, np.uint8)
        self._width = len(self._head) + size

    def read(self, data: bytes, start: int = 0) -> Images | None:
        """Return the images (n, C, H, W) of the ``ClassifyRequest`` that begins there. None: protobuf must read it."""
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
        """Return the id and the images of a ``ClassifyStreamRequest``. None: protobuf must read it."""
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


class AnswerWriter:
    """The writer of the answers of one version of a model."""

    def __init__(self, artifact: Artifact) -> None:
        self._prefix = delimited(1, artifact.name.encode()) + delimited(2, artifact.version.encode())
        # The bytes of all capsules of one image. Only the numbers differ from image to image. For labels of the same
        # length the distance between the numbers is constant, so these are written in one step.
        numbers = 4 * artifact.pose_size
        template = bytearray()
        runs: list[
            tuple[slice, int, np.dtype[np.void]]
        ] = []  # for each run of classes: the classes, their first byte, and their layout
        labels = [label.encode() for label in artifact.labels]
        for _, group in groupby(range(len(labels)), lambda index: len(labels[index])):
            classes, begin = list(group), len(template)
            for index in classes:
                head = delimited(1, labels[index]) + tag(2, FIXED32)
                between = tag(3, BYTES) + varint(numbers)
                prefix = tag(3, BYTES) + varint(len(head) + 4 + len(between) + numbers) + head
                template += prefix + bytes(4) + between + bytes(numbers)
            layout = np.dtype(
                {
                    "names": ["probability", "pose"],
                    "formats": ["<f4", f"({artifact.pose_size},)<f4"],
                    "offsets": [len(prefix), len(prefix) + 4 + len(between)],
                    "itemsize": (len(template) - begin) // len(classes),
                }
            )
            runs.append((slice(classes[0], classes[-1] + 1), begin, layout))
        self._template = bytes(template)
        self._classes = [classes for classes, _, _ in runs]
        self._layout = np.dtype(
            {
                "names": [str(number) for number in range(len(runs))],
                "formats": [(capsule, (classes.stop - classes.start,)) for classes, _, capsule in runs],
                "offsets": [begin for _, begin, _ in runs],
                "itemsize": len(template),
            }
        )
        # By winner, the bytes before the capsules.
        self._heads = []
        for index, label in enumerate(artifact.labels):
            head = delimited(1, label.encode())
            if index:
                head += tag(2, VARINT) + varint(index)
            self._heads.append(tag(3, BYTES) + varint(len(head) + len(template)) + head)

    def __call__(self, share: Share) -> bytes:
        """Return the ``ClassifyResponse`` for the images of a share."""
        probabilities, poses = share[PROBABILITIES], share[POSES]
        written = bytearray(self._template * len(share))
        images = np.frombuffer(written, self._layout)
        for number, classes in enumerate(self._classes):
            capsules = images[str(number)]
            capsules["probability"] = probabilities[:, classes]
            capsules["pose"] = poses[:, classes]
        parts: list[bytes | memoryview] = [self._prefix]
        width, view = self._layout.itemsize, memoryview(written)
        for index, winner in enumerate(probabilities.argmax(1).tolist()):
            parts += self._heads[winner], view[index * width : (index + 1) * width]
        return b"".join(parts)


class CapsNetCodec:
    """The reader of requests for one version of a model, and the writer of its answers."""

    def __init__(self, artifact: Artifact, max_images: int) -> None:
        """Prepare a codec. max_images: the most images in one request."""
        self.artifact = artifact
        self.pixels = PixelReader(artifact.image_shape, max_images)
        self.write = AnswerWriter(artifact)
