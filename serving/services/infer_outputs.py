"""The outputs of the Open Inference Protocol: those of the network, and those that a request must choose by name.

Axes: n images, J classes, R routing iterations, I primary capsules.
"""

import numpy as np
from numpy.typing import NDArray

from serving.artifact import Artifact
from serving.batching.ticket import Share
from serving.errors import InvalidRequest
from serving.files.occlusion import Occlusion
from serving.metrics.registry import CLASSIFY
from serving.repository.classifier import IMAGES, POSES, PROBABILITIES
from serving.repository.findings import CONFIDENCES, Findings
from serving.repository.further_graph import CONTRIBUTIONS, COUPLINGS
from serving.runtime import Array
from serving.services.computation import Computation
from serving.services.drawing import draw
from serving.services.encoded_images import Images
from serving.services.explanations import check_relevance, relevance_of
from serving.services.graphs import EXPLAIN, draws, explains
from serving.settings import Settings

#: The outputs of the network. They come if a request names none.
ALWAYS = (PROBABILITIES, POSES)
#: The calibrated confidences, (n, J); the relevance of each pixel for a class, (n, H, W); and the drawn pose of a
#: class, (n, C, H, W), pixels from 0 to 1. Couplings are (n, R, J, I), contributions (n, J, I).
CONFIDENCE, RELEVANCE, RECONSTRUCTION = "confidence", "relevance", "reconstruction"
#: The outputs that are of one class of each image.
OF_ONE_CLASS = (RELEVANCE, RECONSTRUCTION)
#: The names of the arrays of outputs, where they differ.
SOURCES = {CONFIDENCE: CONFIDENCES}

_EXPLAINED = frozenset({COUPLINGS, CONTRIBUTIONS, RELEVANCE})
#: The outputs that take more than the classifying graph.
COMPUTED = _EXPLAINED | {RECONSTRUCTION}


def output_shapes(artifact: Artifact) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's outputs by name, without the number of images.

    A model lacks those that it has no graph or calibration for.
    """
    classes, image = len(artifact.labels), artifact.image_shape
    shapes: dict[str, tuple[int, ...]] = {PROBABILITIES: (classes,), POSES: (classes, artifact.pose_size)}
    if artifact.calibration:
        shapes[CONFIDENCE] = (classes,)
    if explains(artifact):
        outputs = artifact.graphs[EXPLAIN].outputs
        shapes |= {COUPLINGS: outputs[COUPLINGS].shape, CONTRIBUTIONS: outputs[CONTRIBUTIONS].shape}
        shapes[RELEVANCE] = image[1:]
    if draws(artifact):
        shapes[RECONSTRUCTION] = image
    return shapes


class FurtherOutputs:
    """The computation of the outputs that take more than the classifying graph, for one version of a model."""

    def __init__(self, artifact: Artifact, settings: Settings) -> None:
        self._settings = settings
        self._occlusion = Occlusion(*artifact.image_shape[1:])
        self._findings = Findings(artifact.calibration, len(artifact.labels)) if artifact.calibration else None

    def check(self, wanted: dict[str, int | None], images: int) -> None:
        """Check that a request may have these outputs for so many images. Raises InvalidRequest."""
        limit = self._settings.max_explained_images
        if (explained := sorted(_EXPLAINED & wanted.keys())) and images > limit:
            text = f"{images} images with the output {explained[0]!r}; expected 1 to {limit} (max_explained_images)"
            raise InvalidRequest("inputs[0].shape", text)
        if RELEVANCE in wanted:
            check_relevance(self._occlusion, self._settings, f"outputs[{list(wanted).index(RELEVANCE)}].name")

    async def compute(self, computation: Computation, images: Images, wanted: dict[str, int | None]) -> Share:
        """Return the arrays of outputs of images (n, C, H, W).

        wanted: by name of the output, the class that it is of, or None for the winner of each image. Raises as
        Computation.decode and Computation.run.
        """
        explained = bool(_EXPLAINED & wanted.keys())
        share = await computation.run(EXPLAIN if explained else CLASSIFY, {IMAGES: images})
        arrays: dict[str, Array] = {name: share[name] for name in share.batch}
        if explained and CONFIDENCE in wanted and self._findings:
            arrays |= self._findings(images, arrays[PROBABILITIES])
        winners = arrays[PROBABILITIES].argmax(1).tolist()
        if RELEVANCE in wanted:
            chosen = wanted[RELEVANCE]
            classes = winners if chosen is None else [chosen] * len(images)
            field = f"outputs[{list(wanted).index(RELEVANCE)}].name"
            arrays[RELEVANCE] = await self._relevance(computation, images, classes, field)
        if RECONSTRUCTION in wanted:
            chosen = wanted[RECONSTRUCTION]
            classes = winners if chosen is None else [chosen] * len(images)
            poses = np.asarray(arrays[POSES], np.float32)[np.arange(len(images)), classes]
            arrays[RECONSTRUCTION] = await draw(computation, poses, classes)
        return Share(arrays, 0, len(images))

    async def _relevance(
        self, computation: Computation, images: Images, classes: list[int], field: str
    ) -> NDArray[np.float32]:
        """Return the relevance of the pixels of images, each for one class, (n, H, W)."""
        maps = [
            (await relevance_of(computation, self._occlusion, image, [chosen], field))[0]
            for image, chosen in zip(images, classes, strict=True)
        ]
        return np.stack(maps)
