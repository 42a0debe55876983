"""``CERTIFICATE.md``: the comparisons of an artifact, their results, and the parts that were not run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from export.calibrate import Calibrated
from serving.artifact import Graph, Training, Variant

CERTIFICATE = "CERTIFICATE.md"

_HALF_PRECISION = (
    "**fp16 on the CPU is single precision:** ONNX Runtime's CPU provider computes the convolutions and products of "
    "`fp16.onnx` in single precision, from weights in half precision; the row fp16, and its speed, are of that. The "
    'row "fp16, rounded" is an emulation: the same graph with the result of each of its half-precision operations '
    "rounded to half precision, sums within an operation in single precision."
)


_ROUNDING = (
    "**Rounding:** some images differ by more than single precision should, since they amplify what it rounds, in "
    "PyTorch too. These were computed in double precision by PyTorch. A graph is written if its largest and its mean "
    "distance from that are at most twice those of PyTorch in single precision."
)
_CALIBRATION = (
    "**Calibration:** a capsule's length is no probability. These figures say what the lengths mean. They were "
    "measured with `model.onnx` on {images:,} images: {source}."
)
_ONE = "the confidences of an image are softmax(arctanh(lengths) / temperature)"
_SEVERAL = (
    "the weight of a set of {objects} classes is exp(sum of their arctanh(length) / temperature); the confidence of a "
    "class is the weight of the sets that it is in, divided by {objects} times the weight of all sets"
)
_OBJECTS = (
    "An image is taken to show {objects} objects of different classes: the confidence of a class is the probability "
    "that one of them, chosen at random, is of this class. So it is at most 1 / {objects}, which each class has that "
    "is surely shown, and {objects} times the confidence is the probability that the class is shown."
)
_ECE = (
    "On the test images, to which no figure was fitted, the length of the longest capsule differs from the share of "
    "right answers by {length:.2f} points on average, and its confidence by {confidence:.2f} points (expected "
    "calibration error in 15 bins of equal width). {right}In {exact:.2f} % of them the present classes are exactly "
    "those that the image shows."
)
_RIGHT_OF_SEVERAL = (
    "An answer is right if the image shows its class. A right answer counts as 1 against the length, and as "
    "1 / {objects} against the confidence. The confidences of the {objects} longest capsules of each image, taken "
    "together, differ by {confidences:.2f} points. "
)
_ALARMS = (
    "**False alarms:** with the margin and the reconstruction error together, {share:.0%} of the measured images are "
    "suspicious or have no present class{several}."
)
_ALARMS_OF_SEVERAL = ", and as many of the images with one object, on which the margin was measured"
_DETECTION = (
    "**Detection:** the share of the images with no present class, with several, and with one. An image with one or "
    "several is suspicious if its reconstruction error is larger than the threshold, and an image with one also if its "
    "margin is less; else the answer for one class is confident. The mean confidence is that of the longest capsules. "
    "{wanted} Only the kinds with "
    '"yes" were shown to the network in its training, as none of the classes. '
    "The server calls an image of one grey level blank, whatever its capsules say."
)
_WANTED_OF_ONE = "Test images are to be confident: what is missing there are false alarms. No other kind is to be."
_WANTED_OF_SEVERAL = "Test images are to be several, and one object alone confident. All other kinds are to be neither."
_MAX_SHOWN_CLASSES = 20
_SHARED = "Some weights of {files} are stored in `{file}` alone: keep these files in the same folder."
_STORED = "`{file}` stores its weights in 8 bits, with a step for each output, and computes in single precision."


def certificate(
    name: str,
    version: str,
    training: Training,
    variants: Mapping[str, Variant],
    graphs: Mapping[str, Graph],
    files: Mapping[str, str],
    failures: Mapping[str, str],
    calibrated: Calibrated | None = None,
) -> str:
    """Return the page for graphs that have their figures.

    variants: by precision, the graphs that classify. graphs: by name, the other graphs. files: by name, the SHA-256 of
    each file. failures: by precision, the reason why it is missing. calibrated: None for a page without a calibration.
    """
    first = next(iter(variants.values()))
    parts = [
        f"# {name}, version {version}",
        f"Each graph that classifies was run by {first.runtime} ({first.provider}) over all "
        f"{first.test_images:,} test images of {training.dataset} and "
        f"{first.images - first.test_images} others (blank, saturated, single pixels, noise), and compared with "
        f"{first.reference} in single precision on the same network. "
        "Every value was finite. A graph that differs by more than is tolerated is not written.",
        _table(
            ("precision", "file", "bytes", "test error", "labels changed",
             "probabilities: largest, mean difference", "poses: largest, mean difference", "tolerated"),
            [row for precision, variant in variants.items() for row in _rows(precision, variant)],
        ),
        f"Images a second on {first.device}, all graphs in turns:",
        _speeds(variants),
    ]  # fmt: skip
    parts[3:3] = _doubtful(variants, graphs)
    if any(variant.rounded for variant in variants.values()):
        parts.insert(3, _HALF_PRECISION)
    parts += [f"**{precision} is not here.** {reason}." for precision, reason in failures.items()]
    others = [
        (
            graph_name,
            f"`{graph.file}`",
            f"{graph.images:,}" if graph.images else "none",
            _differences(graph) or "not compared",
        )
        for graph_name, graph in graphs.items()
    ]
    parts += [
        "Further graphs:",
        _table(("graph", "file", "images compared", "largest differences"), others),
        *_shared(variants, graphs),
        *(_STORED.format(file=graph.file) for graph in graphs.values() if graph.precision == "int8"),
        *(_calibration(calibrated) if calibrated else ()),
        "**Not run:** CUDA and TensorRT. All graphs were compared, and timed, on the CPU alone.",
        _table(("file", "SHA-256"), [(f"`{file}`", f"`{sha256}`") for file, sha256 in files.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _shared(variants: Mapping[str, Variant], graphs: Mapping[str, Graph]) -> list[str]:
    """Return a sentence for each file that other graphs read weights from."""
    readers: dict[str, list[str]] = {}
    every: list[Variant | Graph] = [*variants.values(), *graphs.values()]
    for graph in every:
        if graph.weights:
            readers.setdefault(graph.weights, []).append(f"`{graph.file}`")
    return [_SHARED.format(files=" and ".join(files), file=file) for file, files in readers.items()]


def _calibration(calibrated: Calibrated) -> list[str]:
    """Return the figures of a calibration, and what it detects."""
    found = calibrated.calibration
    shown = ", ".join(f"{value:g}" for value in found.presence)
    presence = f"{min(found.presence):g} to {max(found.presence):g}"
    if len(found.presence) <= _MAX_SHOWN_CLASSES:
        presence = f"{presence} (by class: {shown})"
    objects = found.objects
    rows = [
        ("temperature", f"{found.temperature:g}", _ONE if objects == 1 else _SEVERAL.format(objects=objects)),
        ("presence", presence, "the least length of a present class; as many images miss a class as have it falsely"),
        ("margin", f"{found.margin:g}", "the longest capsule less the second longest, where one class is present"),
    ]
    if found.reconstruction_error:
        meaning = "mean squared difference of the image from the reconstruction of its present classes, pixels 0 to 1"
        rows.append(("reconstruction error", f"{found.reconstruction_error:g}", meaning))
    points = {name: 100 * value for name, value in found.ece.items()}
    right = _RIGHT_OF_SEVERAL.format(**points, objects=objects) if objects > 1 else ""
    kinds = [
        (
            kind,
            "yes" if kind in calibrated.trained else "",
            *(f"{100 * share:.1f} %" for share in findings.values()),
            f"{calibrated.mean_confidences[kind]:.3f}",
        )
        for kind, findings in found.detected.items()
    ]
    findings = [*next(iter(found.detected.values())), "mean confidence"]
    kinds += [(kind, "", "not run", *[""] * (len(findings) - 1)) for kind in calibrated.missing]
    return [
        _CALIBRATION.format(images=found.images, source=found.source),
        _table(("figure", "value", "meaning"), rows),
        _ALARMS.format(share=found.false_alarms, several=_ALARMS_OF_SEVERAL if objects > 1 else ""),
        *([_OBJECTS.format(objects=objects)] if objects > 1 else []),
        _ECE.format(**points, right=right, exact=100 * calibrated.exact),
        _DETECTION.format(wanted=_WANTED_OF_ONE if objects == 1 else _WANTED_OF_SEVERAL),
        _table(("images", "in training", *findings), kinds),
        *(f"**{kind}: not run.** {reason}." for kind, reason in calibrated.missing.items()),
    ]


def _doubtful(variants: Mapping[str, Variant], graphs: Mapping[str, Graph]) -> list[str]:
    """Return the notes on the images whose differences are beyond the tolerance of single precision."""
    every: list[Variant | Graph] = [*variants.values(), *graphs.values()]
    judged = [graph for graph in every if graph.double_precision]
    if not judged:
        return []
    texts = [_ROUNDING]
    for graph in judged:
        figures = graph.double_precision
        texts.append(
            f"`{graph.file}`: {figures['images']:,.0f} of {graph.images or 0:,} images. The graph is up to "
            f"{figures['max_distance']:.2g} from the double precision ({figures['mean_distance']:.2g} in the mean over "
            f"these images), PyTorch in single precision up to {figures['max_pytorch_distance']:.2g} "
            f"({figures['mean_pytorch_distance']:.2g})."
        )
    return texts


def _rows(precision: str, variant: Variant) -> list[tuple[str, ...]]:
    """Return the row of a graph, and for half precision one more with every operation's result rounded."""
    rows = [(precision, *_compared(variant))]
    if variant.rounded:
        rows.append((f"{precision}, rounded", *_compared(replace(variant, **variant.rounded))))  # type: ignore[arg-type]
    return rows


def _compared(variant: Variant) -> tuple[str, ...]:
    errors, images = variant.test_errors, variant.test_images
    pairs = (
        f"{variant.max_probability_difference:.2g}, {variant.mean_probability_difference:.2g}",
        f"{variant.max_pose_difference:.2g}, {variant.mean_pose_difference:.2g}",
    )
    tolerance = variant.tolerance
    texts = {
        "difference": "differences of {:g}",
        "mean_difference": "{:g} in the mean",
        "labels_changed": "labels changed: {:.2%}",
        "more_errors": "errors more: {:.2%}",
    }
    tolerated = ", ".join(text.format(tolerance[name]) for name, text in texts.items() if tolerance[name] is not None)
    return (
        f"`{variant.file}`", f"{variant.bytes:,}", f"{100 * errors / images:.2f} % ({errors:,})",
        f"{variant.labels_changed:,}", *pairs, tolerated,
    )  # fmt: skip


def _speeds(variants: Mapping[str, Variant]) -> str:
    batches = list(next(iter(variants.values())).images_per_second)
    first = next(iter(variants.values())).images_per_second
    rows = []
    for precision, variant in variants.items():
        speed = variant.images_per_second
        rows.append((precision, *(f"{speed[batch]:,.0f} ({speed[batch] / first[batch]:.2f} x)" for batch in batches)))
    return _table(("precision", *(f"batch {batch}" for batch in batches)), rows)


def _differences(graph: Graph) -> str:
    texts = []
    for output, value in graph.differences.items():
        mean = f" ({graph.mean_differences[output]:.2g} in the mean)" if output in graph.mean_differences else ""
        texts.append(f"{output} {value:.2g}{mean}")
    return ", ".join(texts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
