"""Drawing: the images that poses stand for, by the decoder, and their comparison with the images that were sent.

Axes: N poses, B images, E dimensions of a pose.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from serving.batching.ticket import Share
from serving.repository.classifier import POSES, PROBABILITIES
from serving.repository.findings import CODES, PRESENT, Presence, Verdict, present_classes, verdicts
from serving.repository.further_graph import CLASS, IMAGE, POSE
from serving.runtime import Arrays
from serving.services.capsnet_codec import RECONSTRUCTION_ERRORS
from serving.services.computation import Computation
from serving.services.encoded_images import Images
from serving.services.graphs import DECODER

# The most numbers that are drawn before they are compared: the event loop takes some milliseconds for them.
_MAX_DRAWN_NUMBERS = 2**20

Numbers = NDArray[np.float32]


async def draw(computation: Computation, poses: Numbers, classes: Sequence[int]) -> Numbers:
    """Return the images of poses (N, E) of these classes (N,), (N, C, H, W), pixels from 0 to 1.

    Raises as Computation.run.
    """
    limit = computation.model.settings.max_images_per_request  # so that each part fits into the queue
    indices = np.array(classes, np.int64)
    parts = []
    for begin in range(0, len(poses), limit):
        part = slice(begin, begin + limit)
        arrays: Arrays = {POSE: np.ascontiguousarray(poses[part], np.float32), CLASS: indices[part]}
        parts.append(np.asarray((await computation.run(DECODER, arrays))[IMAGE], np.float32))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def shown_classes(share: Share, index: int) -> list[int]:
    """Return the present classes of an image, the longest first; the longest alone if none is, or it is not known."""
    probabilities = share[PROBABILITIES][index]
    present = present_classes(probabilities, share[PRESENT][index]) if PRESENT in share.batch else []
    return present or [int(probabilities.argmax())]


async def with_errors(computation: Computation, images: Images, share: Share) -> Share:
    """Return a share of the classifying graph with the reconstruction errors of its images (B, C, H, W).

    An image with a present class becomes suspicious if its error is above the calibration's. Raises as Computation.run.
    """
    shown = [shown_classes(share, index) for index in range(len(share))]
    errors = np.empty(len(share), np.float32)
    max_poses = max(1, _MAX_DRAWN_NUMBERS // math.prod(images.shape[1:]))
    for part in _parts(shown, max_poses):
        owners = [index for index in range(part.start, part.stop) for _ in shown[index]]
        classes = [one for index in range(part.start, part.stop) for one in shown[index]]
        drawn = await draw(computation, np.asarray(share[POSES], np.float32)[owners, classes], classes)
        errors[part] = compare(images[part], drawn, [len(shown[index]) for index in range(part.start, part.stop)])
    return share_with_errors(computation, share, errors)


def compare(images: Images, drawn: Numbers, counts: Sequence[int]) -> Numbers:
    """Return the reconstruction errors of images (B, C, H, W), (B,): the mean squared differences of pixels.

    drawn: (N, C, H, W). Each image has ``counts`` of them, one after the other, which are added up to 1 at most.
    """
    starts = np.cumsum([0, *counts[:-1]])
    together = np.minimum(np.add.reduceat(drawn, starts, axis=0), 1)
    errors: Numbers = np.square(together - images.astype(np.float32) / 255).mean((1, 2, 3))
    return errors


def share_with_errors(computation: Computation, share: Share, errors: Numbers) -> Share:
    """Return the share with errors (B,), and with the verdicts that follow from them."""
    outputs = {name: share[name] for name in share.batch} | {RECONSTRUCTION_ERRORS: errors}
    calibration = computation.model.artifact.calibration
    if calibration and CODES in outputs:
        codes = np.asarray(outputs[CODES], np.int64)
        found = verdicts(codes)
        strange = np.isin(found, (Verdict.OK, Verdict.SEVERAL)) & (
            errors > np.float32(calibration.reconstruction_error)
        )
        outputs[CODES] = codes + strange * (len(Presence) * (Verdict.SUSPICIOUS - found))
    return Share(outputs, 0, len(share))


def _parts(shown: Sequence[Sequence[int]], max_poses: int) -> Iterator[slice]:
    """Yield parts of the images with ``max_poses`` poses at most, or with one image."""
    begin = poses = 0
    for index, classes in enumerate(shown):
        if poses and poses + len(classes) > max_poses:
            yield slice(begin, index)
            begin, poses = index, 0
        poses += len(classes)
    yield slice(begin, len(shown))
