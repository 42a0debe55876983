"""The messages of ``capsnet.v1`` for classification, read and written as bytes without protobuf's classes.

Only bytes with a single possible meaning are read here, in the form in which protobuf writes them. Protobuf reads all
others. Answers have the bytes of protobuf's own encoding, with one exception: a probability, component or confidence
of exactly 0 is written here, and omitted there.
"""

import math
import struct
import weakref
from itertools import groupby
from typing import NamedTuple

import numpy as np

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.artifact import Artifact
from serving.batching.ticket import Share
from serving.repository.classifier import POSES, PROBABILITIES
from serving.repository.findings import CODES, CONFIDENCES, PRESENT, Code, Findings, Presence, Verdict, present_classes
from serving.runtime import Array
from serving.services.encoded_images import Images
from serving.services.protobuf_wire import BYTES, FIXED32, VARINT, delimited, tag, varint

_ID = tag(pb.ClassifyStreamRequest.ID_FIELD_NUMBER, BYTES)
_REQUEST = tag(pb.ClassifyStreamRequest.REQUEST_FIELD_NUMBER, BYTES)
_IMAGE = tag(pb.ClassifyRequest.IMAGES_FIELD_NUMBER, BYTES)
_PIXELS = tag(pb.Image.PIXELS_FIELD_NUMBER, BYTES)
_RESULTS = pb.ClassifyResponse.RESULTS_FIELD_NUMBER
_PRESENT = pb.Classification.PRESENT_FIELD_NUMBER
_VERDICT = pb.Classification.VERDICT_FIELD_NUMBER
_ERROR = pb.Classification.RECONSTRUCTION_ERROR_FIELD_NUMBER
_CONFIDENCE = tag(pb.Classification.CONFIDENCE_FIELD_NUMBER, FIXED32)
_ONE_BYTE = 0x80  # lengths below it take one byte

#: The output with the reconstruction errors of images, (B,) float32, of requests that ask for it.
RECONSTRUCTION_ERRORS = "reconstruction_errors"


class PixelReader:
    """The reader of requests of raw pixels that name no model."""

    def __init__(self, image_shape: tuple[int, int, int], max_images: int) -> None:
        """Prepare a reader. image_shape: (C, H, W) of the images. max_images: the most images in one request."""
        self._shape = image_shape
        self._shape_of_one = (1, *image_shape)
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
            return np.ndarray(self._shape_of_one, np.uint8, data, start + len(self._head))
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
    """The writer of the answers of one version of a model.

    A calibrated model's answers have the findings of each image too.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._prefix = delimited(1, artifact.name.encode()) + delimited(2, artifact.version.encode())
        self._labels = [label.encode() for label in artifact.labels]
        self._calibrated = artifact.calibration is not None
        self._prepare_capsules(artifact.pose_size)
        # By the code of an image, the bytes before and after its numbers.
        self._frames: dict[int, _Frame] = {}
        self._written: _Written | None = None

    def __call__(self, share: Share) -> bytes:
        """Return the ``ClassifyResponse`` for the images of a share."""
        capsules, codes = self._of_batch(share)
        parts: list[bytes | memoryview] = [self._prefix]
        width, frames = len(self._template), self._frames
        errors = share[RECONSTRUCTION_ERRORS].tolist() if RECONSTRUCTION_ERRORS in share.batch else None
        for row in range(share.start, share.stop):
            frame = frames.get(codes[row]) if errors is None else None
            if frame is None:
                frame = self._frame(share, row - share.start, codes[row], errors)
            head, between, confidence, confidence_bytes, tail = frame
            begin = row * width
            place = begin + confidence
            parts += head, capsules[begin : begin + width], between, capsules[place : place + confidence_bytes], tail
        return b"".join(parts)

    def field(self, number: int, share: Share) -> bytes:
        """Return a field with the ``Classification`` of a share's only image."""
        # The number of the field with results takes one byte.
        return tag(number, BYTES) + self(share)[len(self._prefix) + 1 :]

    def _of_batch(self, share: Share) -> "tuple[memoryview, list[int]]":
        """Return the capsules of all images of a share's batch, as bytes, and the codes or winners of the images.

        They are written once for the requests of a batch, which are answered one after the other.
        """
        probabilities, written = share.batch[PROBABILITIES], self._written
        # A weak reference: an array of ONNX Runtime keeps all memory of its session.
        if written is None or written.source() is not probabilities:
            codes = share.batch[CODES] if self._calibrated else probabilities.argmax(1)
            written = _Written(weakref.ref(probabilities), self._write(share), codes.tolist())
            self._written = written
        return written.capsules, written.codes

    def _write(self, share: Share) -> memoryview:
        """Return the capsules of all images of a share's batch."""
        batch = share.batch
        probabilities, poses = batch[PROBABILITIES], batch[POSES]
        confidences = batch[CONFIDENCES] if self._calibrated else None
        written = bytearray(self._template * len(probabilities))
        images = np.frombuffer(written, self._layout)
        for number, classes in enumerate(self._classes):
            capsules = images[str(number)]
            capsules["probability"] = probabilities[:, classes]
            capsules["pose"] = poses[:, classes]
            if confidences is not None:
                capsules["confidence"] = confidences[:, classes]
        return memoryview(written)

    def _frame(self, share: Share, index: int, number: int, errors: "list[float] | None") -> "_Frame":
        """Return the bytes around the numbers of an image, with this code or, without a calibration, this winner."""
        between = tail = b""
        code = Code.of(number) if self._calibrated else Code(number, Verdict.UNSPECIFIED, Presence.NONE)
        if self._calibrated:
            between = _CONFIDENCE
            present = [code.winner] if code.presence is Presence.WINNER else []
            if code.presence is Presence.OTHERS:
                present = present_classes(share[PROBABILITIES][index], share[PRESENT][index])
            tail = b"".join([delimited(_PRESENT, self._labels[one]) for one in present])
            tail += tag(_VERDICT, VARINT) + varint(code.verdict)
        if errors is not None:
            tail += tag(_ERROR, FIXED32) + struct.pack("<f", errors[index])
        confidence_bytes = 4 if self._calibrated else 0
        head = self._head(code.winner)
        size = len(head) + len(self._template) + len(between) + confidence_bytes + len(tail)
        frame = _Frame(
            tag(_RESULTS, BYTES) + varint(size) + head,
            between,
            self._confidences[code.winner] if self._calibrated else 0,
            confidence_bytes,
            tail,
        )
        if errors is None and code.presence is not Presence.OTHERS:
            self._frames[number] = frame
        return frame

    def _head(self, winner: int) -> bytes:
        head = delimited(1, self._labels[winner])
        return head + tag(2, VARINT) + varint(winner) if winner else head

    def _prepare_capsules(self, pose_size: int) -> None:
        """Prepare the bytes of all capsules of one image. Only the numbers differ from image to image.

        For labels of the same length the distance between the numbers is constant, so these are written in one step.
        """
        numbers = 4 * pose_size
        end = tag(4, FIXED32) + bytes(4) if self._calibrated else b""
        between = tag(3, BYTES) + varint(numbers)
        template = bytearray()
        # For each run of classes: the classes, their first byte, and their layout.
        runs: list[tuple[slice, int, np.dtype[np.void]]] = []
        self._confidences: list[int] = []  # by class, the place of its confidence
        for _, group in groupby(range(len(self._labels)), lambda index: len(self._labels[index])):
            classes, begin = list(group), len(template)
            for index in classes:
                head = delimited(1, self._labels[index]) + tag(2, FIXED32)
                prefix = tag(3, BYTES) + varint(len(head) + 4 + len(between) + numbers + len(end)) + head
                template += prefix + bytes(4) + between + bytes(numbers) + end
                self._confidences.append(len(template) - 4)
            names, pose = ["probability", "pose"], len(prefix) + 4 + len(between)
            formats, offsets = ["<f4", f"({pose_size},)<f4"], [len(prefix), pose]
            if end:
                names, formats = [*names, "confidence"], [*formats, "<f4"]
                offsets = [*offsets, pose + numbers + len(end) - 4]
            size = (len(template) - begin) // len(classes)
            layout = np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": size})
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


class _Written(NamedTuple):
    """The written bytes of a batch. source: its probabilities. codes: of its images; winners without a calibration."""

    source: "weakref.ref[Array]"
    capsules: memoryview
    codes: list[int]


class _Frame(NamedTuple):
    """The bytes of a ``Classification`` around its capsules.

    head: before the capsules. between: before the confidence. confidence: the place of the winner's confidence in the
    bytes of the capsules. confidence_bytes: 4, or 0 without a calibration. tail: after the confidence.
    """

    head: bytes
    between: bytes
    confidence: int
    confidence_bytes: int
    tail: bytes


class CapsNetCodec:
    """The reader of requests for one version of a model, and the writer of its answers.

    findings: those of answers that do not come from the classifying graph; None without a calibration.
    """

    def __init__(self, artifact: Artifact, max_images: int) -> None:
        """Prepare a codec. max_images: the most images in one request."""
        self.artifact = artifact
        self.findings = Findings(artifact.calibration, len(artifact.labels)) if artifact.calibration else None
        self.pixels = PixelReader(artifact.image_shape, max_images)
        self.write = AnswerWriter(artifact)
