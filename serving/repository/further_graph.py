"""Further graphs, such as ``explain`` and ``decoder``. They are opened if a service needs them.

Axes: C channels, H x W pixels, J classes, E dimensions of a pose, R iterations, I primary capsules.
"""

from collections.abc import Mapping

import numpy as np

from serving.artifact import Artifact, Graph
from serving.batching.batch import Hooks
from serving.metrics.registry import ModelMetrics
from serving.repository.classifier import IMAGES, POSES, PROBABILITIES
from serving.repository.served_graph import all_finite
from serving.runtime import Runtime, RuntimeSetupError, example, rows
from serving.settings import Settings

#: Outputs of ``explain``, with R iterations, J classes and I primary capsules: the couplings and agreements of all
#: iterations, (B, R, J, I) each; the contributions, (B, J, I); and the lengths of the primary capsules, (B, I).
COUPLINGS, AGREEMENTS, CONTRIBUTIONS, PRIMARY_LENGTHS = "couplings", "agreements", "contributions", "primary_lengths"
#: Inputs of ``decoder``: poses (B, E) float32, and their classes (B,) int64; its output: pixels from 0 to 1,
#: (B, C, H, W) float32.
POSE, CLASS, IMAGE = "pose", "class", "image"

#: The largest allowed difference between the outputs of a row alone and in a batch.
_TOLERANCE = 0.01

_Shape = tuple[int | None, ...]


class FurtherGraph:
    """A further graph of an artifact, computed in single precision. Its check requires finite answers."""

    labels: tuple[str, ...] = ()
    max_batch = 0

    def __init__(self, name: str, artifact: Artifact, settings: Settings) -> None:
        self.name = name
        self._file = artifact.folder / artifact.graphs[name].file
        self._outputs = artifact.graphs[name].outputs
        self._model_shapes = _shapes_of_model(artifact, artifact.graphs[name])
        self._weights = artifact.weights(artifact.graphs[name])
        self._read = artifact.read
        # TensorRT has shapes for the classifying graph only.
        self._device = "auto" if settings.device == "tensorrt" else settings.device

    def open(self, threads: int) -> Runtime:
        runtime = Runtime(self._file, self._device, threads, weights=self._weights, read=self._read)
        try:
            self._test(runtime)
        except RuntimeSetupError:
            raise
        except Exception as error:
            raise RuntimeSetupError(f"{self._file}: cannot compute two rows: {error}") from error
        return runtime

    def hooks(self, metrics: ModelMetrics) -> Hooks:
        return Hooks(all_finite)

    def _test(self, runtime: Runtime) -> None:
        """Compute two rows together, and one of them alone. Raises RuntimeSetupError if the answers are wrong."""
        inputs = example(runtime.inputs, 2, np.random.default_rng(0))
        together, alone = runtime.run(inputs), runtime.run({name: array[1:] for name, array in inputs.items()})
        if all_finite(together) is not None:
            raise RuntimeSetupError(f"{self._file}: in its self-test it answers with values that are not finite")
        for name, tensor in self._outputs.items():
            shape = together[name].shape[1:] if name in together else None
            if shape != tensor.shape:
                found = "missing" if shape is None else shape
                raise RuntimeSetupError(f"{self._file}: its output {name} is {found}; its manifest says {tensor.shape}")
        shapes: dict[str, _Shape] = {name: spec.shape for name, spec in runtime.inputs.items()}
        shapes |= {name: array.shape[1:] for name, array in together.items()}
        for name, expected in self._model_shapes.items():
            if name in shapes and not _fits(shapes[name], expected):
                raise RuntimeSetupError(
                    f"{self._file}: its {name} is {shapes[name]}; expected {expected} of this model"
                )
        for name, array in together.items():
            if rows({name: array}) != 2 or not np.allclose(array[1:], alone[name], rtol=0, atol=_TOLERANCE):
                raise RuntimeSetupError(f"{self._file}: in its self-test {name} of a row alone and in a batch differ")


def _shapes_of_model(artifact: Artifact, graph: Graph) -> Mapping[str, _Shape]:
    """Return the shapes of tensors that follow from a model, by name. None: any size."""
    classes, pose, field = len(artifact.labels), artifact.pose_size, graph.receptive_field
    primary = field.types * field.grid**2 if field else None
    shapes: dict[str, _Shape] = {
        IMAGES: artifact.image_shape, IMAGE: artifact.image_shape, CLASS: (), POSE: (pose,),
        POSES: (classes, pose), PROBABILITIES: (classes,),
    }  # fmt: skip
    if AGREEMENTS in graph.outputs:  # older graphs have couplings of another form alone
        routed = (None, classes, primary)
        shapes |= {
            COUPLINGS: routed,
            AGREEMENTS: routed,
            CONTRIBUTIONS: routed[1:],
            PRIMARY_LENGTHS: (primary,),
        }
    return shapes


def _fits(shape: _Shape, expected: _Shape) -> bool:
    """Return True if two shapes may be the same."""
    if len(shape) != len(expected):
        return False
    return all(one == other or one is None or other is None for one, other in zip(shape, expected, strict=True))
