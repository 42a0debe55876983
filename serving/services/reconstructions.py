"""Reconstruct: the images that poses stand for, with changes.

Axes: N poses, S steps of a sweep (1 without one), J classes, E dimensions of a pose.
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.artifact import Artifact
from serving.batching.ticket import Share
from serving.errors import InvalidRequest
from serving.files.occlusion import ground_of
from serving.metrics.registry import CLASSIFY
from serving.repository.classifier import IMAGES, POSES
from serving.rpc.edge import Call, check_size, parse
from serving.runtime import Arrays
from serving.services.capsnet_codec import CapsNetCodec
from serving.services.computation import Caller, Computation
from serving.services.decoding import Decoding, Steps, in_one_go
from serving.services.drawing import Numbers, compare, draw, share_with_errors, shown_classes, with_errors
from serving.services.encoded_images import Images
from serving.services.explanations import check_classes
from serving.services.given_images import GivenImages
from serving.services.graphs import check_draws
from serving.services.per_model import PerModel
from serving.services.pipeline import Pipeline
from serving.services.protobuf_wire import MAX_OTHER_FIELDS, check_fields, delimited, fields_of
from serving.settings import Settings

MIN_STEPS, MAX_STEPS = 2, 64
#: The largest number of a pose. A longer pose is none: a capsule's length is below 1.
MAX_NUMBER = 1000.0
#: The share of the brightest reconstruction of a pixel from which on the pixel belongs to a class too.
LAYER_SHARE = 0.6

# The most fields for each of the poses: itself, its class and 16 numbers, if they come one by one. Twice as many poses
# with packed numbers have fewer, so they get the answer that names the limit.
_FIELDS_A_POSE = 18
_FORMATS = pb.FORMAT_UNSPECIFIED, pb.FORMAT_PIXELS, pb.FORMAT_PNG
_FIELDS = fields_of(pb.ReconstructRequest)
# The most memory of Pillow for a pixel of a PNG file.
_WORK_BYTES_A_PIXEL = 8
# The most results that the event loop writes itself: less than a millisecond.
_FEW_RESULTS = 16


class _Edit(NamedTuple):
    """The changes of every pose.

    shift: what is added to each, (E,). dimension, deltas: what a sweep adds to one dimension, (S,); one 0 without one.
    """

    shift: Numbers
    dimension: int
    deltas: Numbers
    empty: bool

    def apply(self, poses: Numbers) -> Numbers:
        """Return the poses (N, E) with the changes, (N * S, E)."""
        steps = len(self.deltas)
        changed = np.repeat(poses + self.shift, steps, axis=0)
        changed[:, self.dimension] += np.tile(self.deltas, len(poses))
        return changed


class _Drawn(NamedTuple):
    """The drawn images.

    classes: of each pose, (N,). poses: with the changes, (N * S, E). images: (N * S, C, H, W), pixels from 0 to 1.
    layers: the parts of the sent image, (N, C, H, W), or None. share: the classification of the sent image, or None.
    """

    classes: list[int]
    poses: Numbers
    images: Numbers
    layers: Images | None = None
    share: Share | None = None


class Reconstructions:
    """The method Reconstruct."""

    def __init__(self, pipeline: Pipeline, settings: Settings, codecs: PerModel[CapsNetCodec]) -> None:
        self._pipeline = pipeline
        self._settings = settings
        self._codecs = codecs

    async def reconstruct(self, data: bytes, call: Call) -> bytes:
        """Answer a ReconstructRequest with a ReconstructResponse. Raises as ``answer``."""
        settings = self._settings
        check_size(data, settings.max_request_bytes)
        check_fields(data, settings.max_images_per_request * _FIELDS_A_POSE + MAX_OTHER_FIELDS, _FIELDS)
        request = parse(data, pb.ReconstructRequest, settings.max_request_bytes)
        del data  # which would double the request's memory until the answer
        return await self.answer(request, call)

    async def answer(self, request: pb.ReconstructRequest, caller: Caller) -> bytes:
        """Return the bytes of a ReconstructResponse.

        Raises InvalidRequest, UnknownModel, Unsupported, and as Computation.run.
        """
        with self._pipeline.computation(request.model_name, request.model_version, caller) as computation:
            artifact = computation.model.artifact
            check_draws(artifact)
            if request.format not in _FORMATS:
                raise InvalidRequest("format", f"{request.format}; expected {_FORMATS[0]} to {_FORMATS[-1]}")
            edit = _edit(request, artifact.pose_size)
            match request.WhichOneof("source"):
                case "image":
                    drawn = await self._from_image(computation, request, edit)
                case "poses":
                    drawn = await self._from_poses(computation, request, edit)
                case _:
                    raise InvalidRequest("source", "neither image nor poses; expected one of them")
            png = request.format == pb.FORMAT_PNG
            results = await _results(computation, _write(artifact, edit, drawn, png), drawn, png)
            return self._response(computation, drawn, results)

    async def _from_poses(self, computation: Computation, request: pb.ReconstructRequest, edit: _Edit) -> _Drawn:
        if request.classes:
            raise InvalidRequest("classes", f"{len(request.classes)} with poses, which have their own; expected none")
        given = request.poses.poses
        if not given:
            raise InvalidRequest("poses.poses", "none; expected one at least")
        self._check_count(len(given), edit, "poses.poses")
        poses, classes = _given_poses(given, computation.model.artifact)
        changed = _changed(poses, edit)
        drawn = await draw(computation, changed, _by_step(classes, edit))
        return _Drawn(classes, changed, drawn)

    async def _from_image(self, computation: Computation, request: pb.ReconstructRequest, edit: _Edit) -> _Drawn:
        artifact = computation.model.artifact
        classes = check_classes(request.classes, len(artifact.labels))
        given = GivenImages([request.image], self._settings, field="image")
        images = await given.decode_for(computation)
        share = await computation.run(CLASSIFY, {IMAGES: images})
        found = shown_classes(share, 0)
        classes = classes or found
        self._check_count(len(classes), edit, "classes")
        poses = np.asarray(share[POSES], np.float32)[0, classes]
        changed = _changed(poses, edit)
        drawn = await draw(computation, changed, _by_step(classes, edit))
        if edit.empty and classes == found:
            share = share_with_errors(computation, share, compare(images, drawn, [len(found)]))
        else:
            share = await with_errors(computation, images, share)
        layers = None
        if edit.empty and len(classes) > 1:
            layers = layers_of(images[0], drawn, ground_of(images[0], artifact.preparation.polarity))
        return _Drawn(classes, changed, drawn, layers, share)

    def _check_count(self, poses: int, edit: _Edit, field: str) -> None:
        """Raise InvalidRequest if poses with a sweep make too many images."""
        limit, steps = self._settings.max_images_per_request, len(edit.deltas)
        if poses * steps > limit:
            raise InvalidRequest(
                field if steps == 1 else "sweep.steps",
                f"{poses * steps} images ({poses} poses in {steps} steps); expected {limit} at most "
                "(max_images_per_request)",
            )

    def _response(self, computation: Computation, drawn: _Drawn, results: Arrays) -> bytes:
        artifact = computation.model.artifact
        channels, height, width = artifact.image_shape
        number = pb.ReconstructResponse.RESULTS_FIELD_NUMBER
        response = [
            pb.ReconstructResponse(
                model_name=artifact.name,
                model_version=artifact.version,
                image_channels=channels,
                image_height=height,
                image_width=width,
            ).SerializeToString(),
            *(delimited(number, result.tobytes()) for result in results.values()),
        ]
        if drawn.share is not None:
            number = pb.ReconstructResponse.CLASSIFICATION_FIELD_NUMBER
            response.append(self._codecs(computation.model).write.field(number, drawn.share))
        return b"".join(response)


def layers_of(image: Images, drawn: Numbers, ground: Images) -> Images:
    """Return the parts of an image (C, H, W) that belong to each of the drawn images (N, C, H, W), in their shape.

    A pixel belongs to each class whose reconstruction has LAYER_SHARE of the brightest one's brightness there; the rest
    of its layer is ground, (C,).
    """
    brightness = drawn.mean(1, keepdims=True)
    belongs = brightness >= LAYER_SHARE * brightness.max(0, keepdims=True)
    layers: Images = np.where(belongs, image, ground[:, np.newaxis, np.newaxis])
    return layers


def _edit(request: pb.ReconstructRequest, size: int) -> _Edit:
    """Return the changes of a request for poses of ``size`` dimensions. Raises InvalidRequest."""
    shift, changed = np.zeros(size, np.float32), set[int]()
    for place, change in enumerate(request.changes):
        field = f"changes[{place}]"
        _check_dimension(change.dimension, size, f"{field}.dimension")
        if change.dimension in changed:
            raise InvalidRequest(f"{field}.dimension", f"{change.dimension} a second time; expected each once")
        _check_number(change.delta, f"{field}.delta")
        changed.add(change.dimension)
        shift[change.dimension] = change.delta
    if not request.HasField("sweep"):
        return _Edit(shift, 0, np.zeros(1, np.float32), not changed)
    sweep = request.sweep
    _check_dimension(sweep.dimension, size, "sweep.dimension")
    _check_number(sweep.first, "sweep.first")
    _check_number(sweep.last, "sweep.last")
    if not MIN_STEPS <= sweep.steps <= MAX_STEPS:
        raise InvalidRequest("sweep.steps", f"{sweep.steps}; expected {MIN_STEPS} to {MAX_STEPS}")
    deltas = np.linspace(sweep.first, sweep.last, sweep.steps, dtype=np.float32)
    return _Edit(shift, sweep.dimension, deltas, False)


def _check_dimension(dimension: int, size: int, field: str) -> None:
    if dimension >= size:
        raise InvalidRequest(field, f"{dimension}; expected 0 to {size - 1}")


def _check_number(number: float, field: str) -> None:
    if not abs(number) <= MAX_NUMBER:  # also if it is not a number
        raise InvalidRequest(field, f"{number:g}; expected {-MAX_NUMBER:g} to {MAX_NUMBER:g}")


def _given_poses(given: Sequence[pb.ClassPose], artifact: Artifact) -> tuple[Numbers, list[int]]:
    """Return the poses (N, E) of a request and their classes. Raises InvalidRequest."""
    classes, size = len(artifact.labels), artifact.pose_size
    poses = np.empty((len(given), size), np.float32)
    for place, one in enumerate(given):
        field = f"poses.poses[{place}]"
        if one.class_index >= classes:
            raise InvalidRequest(f"{field}.class_index", f"{one.class_index}; expected 0 to {classes - 1}")
        if len(one.pose) != size:
            raise InvalidRequest(f"{field}.pose", f"{len(one.pose)} numbers; expected {size}")
        poses[place] = one.pose
        wrong = np.flatnonzero(~(np.abs(poses[place]) <= MAX_NUMBER))
        if len(wrong):
            _check_number(float(poses[place, wrong[0]]), f"{field}.pose[{wrong[0]}]")
    return poses, [one.class_index for one in given]


def _changed(poses: Numbers, edit: _Edit) -> Numbers:
    return poses if edit.empty else edit.apply(poses)


def _by_step(classes: Sequence[int], edit: _Edit) -> list[int]:
    """Return the class of each drawn image."""
    return [one for one in classes for _ in edit.deltas]


def _to_pixels(drawn: Numbers) -> Images:
    return np.rint(255 * np.clip(drawn, 0, 1)).astype(np.uint8)


async def _results(computation: Computation, writing: Steps, drawn: _Drawn, png: bool) -> Arrays:
    """Return the written results. A thread writes PNG files, and many results, which would hold up the event loop."""
    images = drawn.images
    if not png and len(images) <= _FEW_RESULTS:
        return in_one_go(writing)
    memory = 2 * images.nbytes + _WORK_BYTES_A_PIXEL * math.prod(images.shape[1:])
    return await computation.decode(Decoding(writing, memory, "format"))


def _write(artifact: Artifact, edit: _Edit, drawn: _Drawn, png: bool) -> Steps:
    """Write the results, one after the other: bytes of a Reconstruction by its number."""
    steps, results = len(edit.deltas), dict[str, NDArray[np.uint8]]()
    file: Callable[[Images], bytes] = _png_file if png else np.ndarray.tobytes
    for place, (pose, image) in enumerate(zip(drawn.poses, drawn.images, strict=True)):
        index = drawn.classes[place // steps]
        result = pb.Reconstruction(
            label=artifact.labels[index],
            class_index=index,
            pose=pose.tolist(),
            delta=edit.deltas[place % steps],
            image=file(_to_pixels(image)),
            layer=b"" if drawn.layers is None else file(drawn.layers[place]),
        )
        results[str(place)] = np.frombuffer(result.SerializeToString(), np.uint8)
        yield
    return results


def _png_file(image: Images) -> bytes:
    """Return a PNG file of an image (C, H, W)."""
    buffer = io.BytesIO()
    grey = len(image) == 1
    Image.fromarray(image[0] if grey else np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()
