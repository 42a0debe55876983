"""Answers of ``capsnet.v1`` written straight to bytes: building them message by message costs ten times as much.

The bytes are those of a ``ClassifyResponse`` as protobuf's own encoding has them, but for a probability or component
of exactly 0, which is written out here and left out there.
"""

from itertools import groupby
from typing import Any

import numpy as np

from serving.artifact import Artifact
from serving.batching.ticket import Share
from serving.runtime import Arrays
from serving.services.protobuf_wire import BYTES, FIXED32, VARINT, delimited, tag, varint


class AnswerWriter:
    """Writes predictions of one version of one model."""

    def __init__(self, artifact: Artifact) -> None:
        self._prefix = delimited(1, artifact.name.encode()) + delimited(2, artifact.version.encode())
        # All capsules of one image, as bytes that differ from image to image only where the numbers lie. Labels of the
        # same length have their numbers at equal distances, which are written in one step.
        numbers = 4 * artifact.pose_size
        template = bytearray()
        runs: list[tuple[slice, int, np.dtype[np.void]]] = []  # of classes: which, where they begin, and how they lie
        labels = [label.encode() for label in artifact.labels]
        for _, group in groupby(range(len(labels)), lambda index: len(labels[index])):
            classes, begin = list(group), len(template)
            for index in classes:
                head = delimited(1, labels[index]) + tag(2, FIXED32)
                between = tag(3, BYTES) + varint(numbers)
                prefix = tag(3, BYTES) + varint(len(head) + 4 + len(between) + numbers) + head
                template += prefix + bytes(4) + between + bytes(numbers)
            layout: Any = {
                "names": ["probability", "pose"],
                "formats": ["<f4", f"({artifact.pose_size},)<f4"],
                "offsets": [len(prefix), len(prefix) + 4 + len(between)],
                "itemsize": (len(template) - begin) // len(classes),
            }
            runs.append((slice(classes[0], classes[-1] + 1), begin, np.dtype(layout)))
        self._template = bytes(template)
        self._classes = [classes for classes, _, _ in runs]
        layout_of_all: Any = {
            "names": [str(number) for number in range(len(runs))],
            "formats": [(capsule, (classes.stop - classes.start,)) for classes, _, capsule in runs],
            "offsets": [begin for _, begin, _ in runs],
            "itemsize": len(template),
        }
        self._layout = np.dtype(layout_of_all)
        # By winner, what comes before the capsules.
        self._heads = []
        for index, label in enumerate(artifact.labels):
            head = delimited(1, label.encode())
            if index:
                head += tag(2, VARINT) + varint(index)
            self._heads.append(tag(3, BYTES) + varint(len(head) + len(template)) + head)
        self._batch: Arrays | None = None
        self._written = b""  # the capsules of all of its images
        self._winners: list[int] = []

    def __call__(self, share: Share) -> bytes:
        """The predictions of n images as a ``ClassifyResponse``."""
        if share.batch is not self._batch:  # written once for all requests that it answers, one after the other
            self._write(share.batch)
        parts = [self._prefix]
        width = self._layout.itemsize
        at = share.start * width
        for winner in self._winners[share.start : share.stop]:
            parts += self._heads[winner], self._written[at : at + width]
            at += width
        return b"".join(parts)

    def _write(self, batch: Arrays) -> None:
        probabilities, poses = batch["probabilities"], batch["poses"]
        written = bytearray(self._template * len(probabilities))
        images = np.frombuffer(written, self._layout)
        for number, classes in enumerate(self._classes):
            capsules = images[str(number)]
            capsules["probability"] = probabilities[:, classes]
            capsules["pose"] = poses[:, classes]
        self._batch, self._written, self._winners = batch, bytes(written), probabilities.argmax(1).tolist()
