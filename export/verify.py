"""The certificates: comparison of graphs, in the server's runtime, with the PyTorch network."""

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.graph import Explanation, decoder_signature, explain_signature, tensor_types
from export.to_fp16 import rounded
from serving.artifact import Graph
from serving.runtime import CPU, Runtime, onnxruntime, usable_cores
from training.evaluate import most_probable, predict, wrong
from training.model import CapsNet

BATCHES = (1, 8, 32)  # the batch sizes whose speed a certificate has

_BATCH_SIZE = 250
_EXACT_BATCH_SIZE = 50  # in double precision, where the votes of the paper's network take 1.4 MiB an image
_NOISE_IMAGES = 8
_NOISE_SEED = 0
_EXPLAINED_IMAGES = 250
_MIN_TIMED_SECONDS = 0.3  # for each graph and batch size, in turns
_ROUNDS = 5


_MAX_PIXEL = 255

#: The largest share of the images that may exceed fp32's largest difference. For these images, the factor by which the
#: graph may be further than PyTorch in single precision from PyTorch in double precision.
MAX_DOUBTFUL_SHARE = 0.05
DISTANCE_FACTOR = 2.0

_ROUNDED_FIGURES = (
    "max_probability_difference", "mean_probability_difference", "max_pose_difference", "mean_pose_difference",
    "labels_changed", "test_errors",
)  # fmt: skip


class ParityError(RuntimeError):
    """The exported model and PyTorch differ too much. The text has the numbers."""


class Tolerance(NamedTuple):
    """The largest accepted differences of a graph from PyTorch in single precision. None accepts any difference.

    difference: of a probability or a component of a pose. mean_difference: the mean of all differences. labels_changed,
    more_errors: shares of the test images. A share of a small test set is rounded up to whole images.
    """

    difference: float
    mean_difference: float
    labels_changed: float | None
    more_errors: float | None


TOLERANCES = {
    "fp32": Tolerance(1e-5, 1e-5, 0, 0),
    "fp16": Tolerance(1e-2, 1e-3, 2e-4, None),
    # Wide enough for 8 bits, and far below the difference of another network, or of a pose with a wrong sign.
    "int8": Tolerance(0.2, 0.02, None, 1e-3),
}


#: The largest accepted differences of an explanation's outputs. Unlike the others, agreements and contributions are not
#: bounded by 1, and the length of a primary capsule has the rounding of a convolution with nothing after it.
EXPLANATION_TOLERANCES = {
    "probabilities": 1e-5,
    "poses": 1e-5,
    "couplings": 1e-5,
    "agreements": 5e-5,
    "contributions": 5e-5,
    "primary_lengths": 5e-5,
}

#: Of a decoder whose weights are stored in 8 bits, in pixels from 0 to 1.
DECODER_TOLERANCE = Tolerance(0.25, 0.005, None, None)


class Prediction(NamedTuple):
    """The results of a network: poses (B, J, E) float32, and their lengths, the probabilities (B, J) float32."""

    probabilities: NDArray[np.float32]
    poses: NDArray[np.float32]


class Reference(NamedTuple):
    """The results of PyTorch: probabilities (B, J) and poses (B, J, E) of the test images and then the edge images.

    images: uint8 (B, C, H, W); labels: int64 (M,) or (M, K), of the test images alone. network: the PyTorch network,
    for results in double precision.
    """

    images: Tensor
    labels: Tensor
    prediction: Prediction
    network: CapsNet


def edge_images(channels: int, size: int) -> Tensor:
    """Return unusual images that no test set has, uint8 (B, C, H, W).

    The first is blank, the second is saturated (255), the next five have a single saturated pixel at a corner or in the
    middle. The rest are uniform noise, the same at each call.
    """
    blank = torch.zeros((1, channels, size, size), dtype=torch.uint8)
    images = [blank, torch.full_like(blank, 255)]
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1), (size // 2, size // 2)):
        pixel = blank.clone()
        pixel[..., row, column] = 255
        images.append(pixel)
    generator = torch.Generator().manual_seed(_NOISE_SEED)
    shape = (_NOISE_IMAGES, channels, size, size)
    images.append(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))
    return torch.cat(images)


def reference(network: CapsNet, images: Tensor, labels: Tensor) -> Reference:
    """Run PyTorch over the test images, uint8 (M, C, H, W), and edge images. Raises ParityError like ``certify``."""
    every = torch.cat((images, edge_images(network.config.image_channels, network.config.image_size)))
    prediction = Prediction(*(tensor.numpy() for tensor in predict(network, every)))
    _check_finite("PyTorch", prediction)
    return Reference(every, labels, prediction, network)


def certify(reference: Reference, runtime: Runtime, precision: str) -> dict[str, Any]:
    """Compare the graph in ``runtime`` with the reference.

    The edge images are computed one by one, so that both batches of one and full batches are compared. Returns the
    figures for the manifest, with absolute differences. Raises ParityError if a value is not finite or exceeds
    ``TOLERANCES[precision]``. In single precision a few images may exceed the largest difference, if PyTorch itself is
    as far from its results in double precision (see ``_double_precision``).
    """
    count = len(reference.labels)
    images, edges = reference.images[:count], reference.images[count:]
    found = _compute(runtime, [*images.split(_BATCH_SIZE), *edges.split(1)])  # type: ignore[no-untyped-call]
    _check_finite("the exported model", found)
    differences = [np.abs(one - other) for one, other in zip(found, reference.prediction, strict=True)]
    objects = reference.labels.shape[1] if reference.labels.ndim == 2 else 1
    answers, expected = (
        most_probable(torch.from_numpy(prediction.probabilities), objects)
        for prediction in (found, reference.prediction)
    )
    errors, errors_before = (
        int(wrong(torch.from_numpy(prediction.probabilities[:count]), reference.labels).sum())
        for prediction in (found, reference.prediction)
    )
    changed = int((answers != expected).any(1)[:count].sum())
    tolerance = TOLERANCES[precision]
    figures: dict[str, Any] = {
        "reference": f"PyTorch {torch.__version__}",
        "runtime": runtime.description,
        "provider": runtime.provider,
        "images": len(reference.images),
        "max_probability_difference": float(differences[0].max()),
        "mean_probability_difference": float(differences[0].mean(dtype=np.float64)),
        "max_pose_difference": float(differences[1].max()),
        "mean_pose_difference": float(differences[1].mean(dtype=np.float64)),
        "labels_changed": changed,
        "test_errors": errors,
        "test_images": count,
        "tolerance": tolerance._asdict(),
    }
    if precision == "fp32":
        figures["double_precision"] = _double_precision(
            found, reference.prediction, lambda chosen: _exact(reference.network, reference.images[chosen])[:2]
        )
    if _exceeds(figures, tolerance, errors - errors_before):
        raise ParityError(
            f"{precision} and PyTorch differ: {changed} of {count} labels changed, "
            f"{errors} in place of {errors_before} errors in {count} test images, probabilities differ by up to "
            f"{figures['max_probability_difference']:.2g} and poses by up to {figures['max_pose_difference']:.2g}; "
            f"tolerated are {_tolerated(tolerance, count)}"
        )
    return figures


def _exceeds(figures: Mapping[str, Any], tolerance: Tolerance, more_errors: int) -> bool:
    """Return True if the figures of a comparison exceed the tolerance. more_errors: than PyTorch makes."""
    count, changed = figures["test_images"], figures["labels_changed"]
    largest = max(figures["max_probability_difference"], figures["max_pose_difference"])
    mean = max(figures["mean_probability_difference"], figures["mean_pose_difference"])
    return bool(
        (largest > tolerance.difference and not figures.get("double_precision"))
        or mean > tolerance.mean_difference
        or (tolerance.labels_changed is not None and changed > np.ceil(tolerance.labels_changed * count))
        or (tolerance.more_errors is not None and more_errors > np.ceil(tolerance.more_errors * count))
    )


def _exact(network: CapsNet, images: Tensor) -> list[NDArray[np.float64]]:
    """Return PyTorch's outputs of ``Explanation`` for uint8 images, computed in double precision."""
    double = Explanation(copy.deepcopy(network).double())
    with torch.inference_mode():
        parts = [double.explain(part.double() / _MAX_PIXEL) for part in images.split(_EXACT_BATCH_SIZE)]  # type: ignore[no-untyped-call]
    return [torch.cat(part).numpy() for part in zip(*parts, strict=True)]


def _double_precision(
    found: Sequence[NDArray[np.float32]],
    expected: Sequence[NDArray[np.float32]],
    exact: Callable[[Tensor], Sequence[NDArray[np.float64]]],
) -> dict[str, float]:
    """Compare the images whose results differ from PyTorch's by more than fp32 may with PyTorch in double precision.

    The network amplifies rounding errors of single precision for some images, in PyTorch too. So the distance between
    the graph and the results in double precision may be ``DISTANCE_FACTOR`` times that of PyTorch in single precision.
    This holds for the largest and for the mean distance. A distance within the tolerance is accepted too.

    found, expected: by output, the results of the graph and of PyTorch for all images. exact: returns the results in
    double precision of the images with the given indices.

    Returns the distances, or {} if there are no such images, more than MAX_DOUBTFUL_SHARE of all, or if a distance is
    too large.
    """
    tolerance = TOLERANCES["fp32"].difference
    doubtful = np.flatnonzero(~(_farthest(found, expected) <= tolerance))
    if not 0 < len(doubtful) <= np.ceil(MAX_DOUBTFUL_SHARE * len(found[0])):
        return {}
    right = exact(torch.from_numpy(doubtful))
    graph, pytorch = (_farthest([array[doubtful] for array in results], right) for results in (found, expected))
    if not all(measure(graph) <= max(tolerance, DISTANCE_FACTOR * measure(pytorch)) for measure in (np.max, np.mean)):
        return {}
    return {
        "images": len(doubtful),
        "max_distance": float(graph.max()),
        "mean_distance": float(graph.mean()),
        "max_pytorch_distance": float(pytorch.max()),
        "mean_pytorch_distance": float(pytorch.mean()),
    }


def _farthest(found: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return the largest absolute difference in each row of all outputs, (B,)."""
    parts = zip(found, expected, strict=True)
    largest: NDArray[Any] = np.max([np.abs(one - other).reshape(len(one), -1).max(1) for one, other in parts], axis=0)
    return largest


def certify_rounded(reference: Reference, model: onnx.ModelProto) -> dict[str, float]:
    """Compare a graph with the reference like ``certify``, with the result of each operation rounded to half precision.

    model: from ``to_fp16``. Returns the figures that differ from those of the graph as the CPU computes it. Raises
    ParityError.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder) / "rounded.onnx"
        onnx.save_model(rounded(model), file)
        runtime = Runtime(file, "cpu", usable_cores())
        try:
            figures = certify(reference, runtime, "fp16")
        except ParityError as error:
            raise ParityError(f"each operation rounded to half precision: {error}") from error
    return {name: figures[name] for name in _ROUNDED_FIGURES}


def _compute(runtime: Runtime, batches: Sequence[Tensor]) -> Prediction:
    """Run a graph over batches of images. Raises ParityError if it cannot compute them."""
    try:
        parts = [runtime.run({"images": batch.numpy()}) for batch in batches]
        return Prediction(
            *(np.concatenate([np.asarray(part[name], np.float32) for part in parts]) for name in Prediction._fields)
        )
    except Exception as error:  # ONNX Runtime's errors have no common base class
        raise ParityError(f"the exported model cannot compute its answers: {error!r}") from error


def certify_explanation(network: CapsNet, file: Path, reference: Reference) -> Graph:
    """Compare each output of the explanation with PyTorch's on some of the test images and the edge images.

    Returns the manifest's entry. Raises ParityError if a difference exceeds its EXPLANATION_TOLERANCES, except for a
    few images that PyTorch itself rounds badly, as in ``certify``. For these, each output's distances are divided by
    the ratio of its tolerance to that of probabilities.
    """
    tests, signature = len(reference.labels), explain_signature(network.config)
    chosen = torch.cat((reference.images[: min(tests, _EXPLAINED_IMAGES)], reference.images[tests:]))
    explanation = Explanation(network)
    with torch.inference_mode():
        parts = [explanation(part) for part in chosen.split(_EXACT_BATCH_SIZE)]  # type: ignore[no-untyped-call]
    outputs = [torch.cat(part).numpy() for part in zip(*parts, strict=True)]
    expected = dict(zip(signature.outputs, outputs, strict=True))
    inputs = {"images": chosen.numpy()}
    tolerances = EXPLANATION_TOLERANCES
    graph = _compare(
        file, _session(file), inputs, expected, tolerances, lambda indices: _exact(network, chosen[indices])
    )
    return replace(graph, inputs=tensor_types(signature.inputs), outputs=tensor_types(signature.outputs))


def certify_decoder(network: CapsNet, file: Path, reference: Reference, precision: str = "fp32") -> Graph:
    """Compare the decoder graph's reconstructions from each image's longest capsule, like ``certify_explanation``.

    precision: of the stored weights. With int8 all test images are compared, with DECODER_TOLERANCE.
    """
    assert network.decoder is not None
    count = len(reference.labels) if precision == "int8" else _EXPLAINED_IMAGES
    tolerance = DECODER_TOLERANCE if precision == "int8" else TOLERANCES["fp32"]
    everything = [torch.from_numpy(array[:count]) for array in reference.prediction]
    session, graphs, weights = _session(file), list[Graph](), list[int]()
    for probabilities, poses in zip(*(array.split(_BATCH_SIZE) for array in everything), strict=True):  # type: ignore[no-untyped-call]
        classes = probabilities.argmax(1)
        with torch.inference_mode():
            pixels = network.decoder(poses, classes)
        inputs = {"pose": poses[torch.arange(len(poses)), classes].numpy(), "class": classes.numpy()}
        graphs.append(_compare(file, session, inputs, {"image": pixels.numpy()}, {"image": tolerance.difference}))
        weights.append(len(classes))
    largest = max(graph.differences["image"] for graph in graphs)
    mean = float(np.average([graph.mean_differences["image"] for graph in graphs], weights=weights))
    if not mean <= tolerance.mean_difference:
        raise ParityError(
            f"{file.name}: image differs from PyTorch's by {mean:.2g} in the mean; tolerated are "
            f"{tolerance.mean_difference:g}"
        )
    signature = decoder_signature(network.config)
    return Graph(
        file.name,
        sum(weights),
        {"image": largest},
        {"image": mean},
        precision=precision,
        inputs=tensor_types(signature.inputs),
        outputs=tensor_types(signature.outputs),
    )


def speeds(runtimes: Mapping[str, Runtime], images: Tensor) -> dict[str, dict[str, float]]:
    """Measure images a second of each graph at each of BATCHES, ``{name: {batch: speed}}``, as medians of rounds.

    images: uint8 (B, C, H, W), repeated if there are fewer than the largest batch.
    """
    result: dict[str, dict[str, float]] = {name: {} for name in runtimes}
    for batch in BATCHES:
        given = {"images": images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch].numpy()}
        samples: dict[str, list[float]] = {name: [] for name in runtimes}
        for _ in range(_ROUNDS):
            for name, runtime in runtimes.items():
                samples[name].append(batch * _calls_per_second(partial(runtime.run, given)))
        for name, values in samples.items():
            result[name][str(batch)] = round(statistics.median(values), 1)
    return result


def _calls_per_second(call: Callable[[], object]) -> float:
    calls, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < _MIN_TIMED_SECONDS / _ROUNDS or not calls:
        call()
        calls += 1
    return calls / elapsed


def _session(file: Path) -> Any:
    return onnxruntime().InferenceSession(str(file), providers=[CPU])


def _compare(
    file: Path,
    session: Any,
    inputs: dict[str, NDArray[Any]],
    expected: dict[str, NDArray[np.float32]],
    tolerances: Mapping[str, float],
    exact: Callable[[Tensor], Sequence[NDArray[np.float64]]] | None = None,
) -> Graph:
    """Compare a graph's outputs with those that are expected. tolerances: by output, the largest difference.

    exact: of the images with the given indices, the outputs in double precision, see ``_double_precision``.
    """
    found = session.run(list(expected), inputs)
    judged = {}
    if exact is not None:
        units = [TOLERANCES["fp32"].difference / tolerances[name] for name in expected]

        def scaled(outputs: Iterable[NDArray[Any]]) -> list[NDArray[Any]]:
            return [array * unit for array, unit in zip(outputs, units, strict=True)]

        judged = _double_precision(scaled(found), scaled(expected.values()), lambda chosen: scaled(exact(chosen)))
    differences: dict[str, float] = {}
    means: dict[str, float] = {}
    for name, array in zip(expected, found, strict=True):
        largest = float(np.abs(array - expected[name]).max())
        if not largest <= tolerances[name] and not judged:  # true for NaN too
            raise ParityError(
                f"{file.name}: {name} differ from PyTorch's by {largest:.2g}; tolerated are {tolerances[name]:g}"
            )
        differences[name] = largest
        means[name] = float(np.abs(array - expected[name]).mean(dtype=np.float64))
    return Graph(file.name, len(next(iter(inputs.values()))), differences, means, double_precision=judged)


def _check_finite(source: str, prediction: Prediction) -> None:
    broken = sum(int(np.count_nonzero(~np.isfinite(array))) for array in prediction)
    if broken:
        raise ParityError(f"{source} computes {broken} values that are not finite numbers")


def _tolerated(tolerance: Tolerance, count: int) -> str:
    shares = {"labels changed": tolerance.labels_changed, "errors more": tolerance.more_errors}
    texts = [f"{int(np.ceil(share * count))} {name}" for name, share in shares.items() if share is not None]
    return ", ".join((*texts, f"differences of {tolerance.difference:g}, {tolerance.mean_difference:g} in the mean"))
