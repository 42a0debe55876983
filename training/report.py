"""The report of a finished run: one page, ``report.md``, and its pictures.

``python -m training.report RUN`` writes them again.
"""

import argparse
import csv
import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import NormalDist

from torch import Tensor

from serving.files.program import add_version, command_of, parse_path, reason_of
from training.calibration import ECE_BINS, expected_calibration_error
from training.checkpoint import Checkpoint, CheckpointError, load
from training.data.datasets import Dataset
from training.data.matching import load_matching
from training.data.sources import DatasetError, add_file_flags
from training.evaluate import confusion, predict, wrong
from training.model import CONFIGS
from training.pictures import (
    CURVES,
    confusion_picture,
    curves_picture,
    decoder_has_learned,
    decoder_picture,
    mistakes_picture,
    save,
)
from training.routing_figures import RoutingFigures, routing_figures
from training.run_folder import CHECKPOINT_FILE, REPORT_FILE

MAX_TABLE_CLASSES = 20  # in the table of errors by class


def write_report(folder: Path, checkpoint: Checkpoint, dataset: Dataset, probabilities: Tensor) -> None:
    """Write ``report.md`` and its pictures into the folder of a finished run.

    probabilities: (M, J), the network's answers to ``dataset.test_images``. The network runs again only on the first
    images, to measure its routing, and on the few images whose reconstructions ``decoder.png`` shows, if it has a
    decoder. The curves come from the logs in the folder; without logs there is no ``curves.png``. Raises ValueError if
    probabilities and checkpoint do not belong to the data.
    """
    labels = dataset.test_labels
    if probabilities.shape != (len(labels), len(dataset.labels)):
        raise ValueError(
            f"probabilities of shape {tuple(probabilities.shape)}; expected {(len(labels), len(dataset.labels))}"
        )
    errors = wrong(probabilities, labels)
    if int(errors.sum()) != checkpoint.figures["test_errors"]:
        raise ValueError(f"{int(errors.sum())} mistakes; the checkpoint has {checkpoint.figures['test_errors']}")
    figures = {}
    if curves := epoch_curves(folder):
        figures["curves.png"] = curves_picture(curves, checkpoint.figures.get("selected_epoch"))
    figures["confusion.png"] = confusion_picture(confusion(probabilities, labels), dataset.labels)
    figures["mistakes.png"] = mistakes_picture(dataset.test_images, labels, probabilities, dataset.labels)
    model = checkpoint.model()
    if model.decoder is not None:
        right = (~errors).nonzero().flatten().tolist()
        chosen = right[0] if right else 0
        figures["decoder.png"] = decoder_picture(model, dataset.labels, dataset.test_images, labels, chosen)
    for name, figure in figures.items():
        save(figure, folder / name)
    # Class names come from folders, whose names need not be text.
    routing = routing_figures(model, dataset.test_images, labels.reshape(len(labels), -1).shape[1])
    learned = model.decoder is None or decoder_has_learned(model, dataset.test_images, labels, len(dataset.labels))
    page = _page(checkpoint, dataset, probabilities, routing, list(figures), _next_steps(folder, checkpoint, learned))
    (folder / REPORT_FILE).write_text(page, encoding="utf-8", errors="backslashreplace")


def wilson(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the 95 % interval of a share, given ``count`` of ``total``, as two numbers from 0 to 1.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference" (1927). Raises ValueError
    where count is not between 0 and total, or total is 0.
    """
    if not 0 <= count <= total or not total:
        raise ValueError(f"{count} of {total}; expected 0 to {total} of 1 or more")
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    middle = (count + z2 / 2) / (total + z2)
    half = math.sqrt(z2 * (count * (total - count) / total + z2 / 4)) / (total + z2)
    # At the ends the interval reaches exactly 0 or 1, which rounding would miss.
    return (max(0.0, middle - half) if count else 0.0), (min(1.0, middle + half) if count < total else 1.0)


def epoch_curves(folder: Path) -> dict[str, dict[int, float]]:
    """Read the figures that a run and its resumptions logged by epoch: ``{name: {epoch: value}}``, epochs from 1.

    Each resumption has its own ``logs/version_N/metrics.csv``; where an epoch is in several, the latest counts. A
    line that was cut off is left out.
    """
    found: dict[str, dict[int, float]] = {}
    logs = (path for path in folder.glob("logs/version_*/metrics.csv") if _version(path).isdecimal())
    for log in sorted(logs, key=lambda path: int(_version(path))):
        with log.open(newline="") as lines:
            for row in csv.DictReader(lines):
                for name in CURVES:
                    try:
                        epoch, value = int(row.get("epoch") or ""), float(row.get(name) or "")
                    except ValueError:
                        continue
                    found.setdefault(name, {})[epoch + 1] = value
    return {name: dict(sorted(found[name].items())) for name in CURVES if name in found}


def _version(log: Path) -> str:
    return log.parent.name.removeprefix("version_")


def _page(
    checkpoint: Checkpoint,
    dataset: Dataset,
    probabilities: Tensor,
    routing: RoutingFigures,
    pictures: Sequence[str],
    next_steps: Sequence[str],
) -> str:
    figures, recipe = checkpoint.figures, checkpoint.recipe
    network = _network(checkpoint)
    test = _error(figures["test_errors"], figures["test_images"])
    sets = [("test", figures["test_images"], figures["test_errors"])]
    if "none_test_images" in figures:
        sets.append(("test, none of the classes", figures["none_test_images"], figures["none_test_errors"]))
    if "held_out_images" in figures:
        sets.insert(0, ("held out", figures["held_out_images"], figures["held_out_errors"]))
        selection = (
            f"The weights kept are those of epoch {figures['selected_epoch']} of {recipe['epochs']}, where the loss on "
            "the held-out images was lowest; having chosen, these images may show a little too low an error."
        )
    else:
        selection = f"No images were held out: the weights are those of the last epoch, {recipe['epochs']}."
    parts = [
        f"# {_plain(dataset.name)}, {network}: test error {test}",
        f"One run, with one seed ({recipe['seed']}): the intervals (Wilson, 95 %) are of the choice of images, and say "
        "nothing of how other seeds would do. The test set was read once, after training had ended and the weights "
        "were chosen.",
        _table(
            ("images", "number", "wrong", "error", "95 % interval"),
            [(name, f"{n:,}", f"{bad:,}", f"{100 * bad / n:.2f} %", _interval(bad, n)) for name, n, bad in sets],
        ),
        selection,
        _calibration(probabilities, dataset.test_labels),
        *next_steps,
        "## What was trained",
        _table(("", ""), _facts(checkpoint, dataset, network)),
    ]
    if command := figures.get("command"):
        parts += ["The command:", textwrap.indent(command, "    ")]
    parts += _routing(routing)
    if len(dataset.labels) > 1:
        parts += _classes(confusion(probabilities, dataset.test_labels), dataset.labels)
    for name in pictures:
        title, note = _PICTURES[name]
        parts += [f"## {title}", note, f"![{title}]({name})"]
    return "\n\n".join(parts) + "\n"


# The title of each picture, and the text that explains it.
_PICTURES = {
    "curves.png": (
        "By epoch",
        "Training losses are means over an epoch's steps, of augmented images and of the weights as they then were; "
        "held-out figures are of the averaged weights at the epoch's end.",
    ),
    "confusion.png": (
        "What was taken for what",
        "Only mistakes are coloured, by the square root of their number. Where an image has several labels and more "
        "than one was missed, nothing tells which was taken for which; they are counted in the order of the classes.",
    ),
    "mistakes.png": (
        "The worst mistakes",
        "Ordered by how much longer the longest wrong capsule is than the label's, or the shortest of several labels'.",
    ),
    "decoder.png": (
        "What the decoder makes of poses",
        "The first image of each class, reconstructed from its longest capsule, or from as many as it has labels, in "
        "the order of the classes; and one pose, whose dimensions are changed one at a time.",
    ),
}


def _length_calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Return the expected calibration error of the longest capsule's length.

    probabilities: (M, J); labels: (M,), or (M, K). An answer is right if the image shows its class.
    """
    lengths, answers = probabilities.max(1)
    right = (labels.reshape(len(labels), -1) == answers[:, None]).any(1)
    return expected_calibration_error(lengths.clamp(0, 1).double().numpy(), right.double().numpy())


def _calibration(probabilities: Tensor, labels: Tensor) -> str:
    error = 100 * _length_calibration_error(probabilities, labels)
    return (
        f"**Calibration:** on the test images, the length of the longest capsule differs from the share of right "
        f"answers by {error:.2f} points on average (expected calibration error in {ECE_BINS} bins of equal width). "
        "The export fits a temperature and measures the confidences that it gives."
    )


def _next_steps(folder: Path, checkpoint: Checkpoint, learned: bool) -> list[str]:
    """Return the section on what to do with the network. learned: False if its decoder has not learned yet."""
    figures, epochs = checkpoint.figures, checkpoint.recipe["epochs"]
    own = " --data FOLDER" if checkpoint.dataset.startswith("folder:") else ""
    models = folder.parent / "models"
    parts = ["## Next"]
    more = f"the training command with `--resume --epochs {2 * epochs}` goes on"
    if checkpoint.recipe.get("steps"):
        more = "train with more `--steps`"
    if figures.get("selected_epoch") == epochs:
        parts.append(f"The held-out loss was lowest in the last epoch, so more epochs may lower it further: {more}.")
    if not learned:
        parts.append(
            "**The decoder has not learned yet:** it draws nearly the same for every image. It learns more slowly "
            f"than the classes do: {more}."
        )
    export = f"{command_of('export')} {folder} {models}{own}"
    commands = f"{export}\n{command_of('serving')} --models {models}"
    return [*parts, "Export the network, and serve it:", textwrap.indent(commands, "    ")]


def _facts(checkpoint: Checkpoint, dataset: Dataset, network: str) -> list[tuple[str, str]]:
    figures = checkpoint.figures
    size = " x ".join(map(str, dataset.test_images.shape[1:]))
    train = figures.get("train_images", len(dataset.train_images) - figures.get("held_out_images", 0))
    decoder = sum(value.numel() for name, value in checkpoint.state_dict.items() if name.startswith("decoder."))
    parameters = f"{figures['parameters'] - decoder:,} without the decoder, {figures['parameters']:,} with it"
    facts = {
        "network": f"{network}: {_settings(asdict(checkpoint.config))}",
        "parameters": parameters if decoder else f"{figures['parameters']:,}; it has no decoder",
        "data": f"{_plain(dataset.name)}: images of {size}, classes: {len(dataset.labels)}; {train:,} to train on, "
        f"{figures.get('held_out_images', 0):,} held out, {figures['test_images']:,} for the test",
        "recipe": _settings(checkpoint.recipe),
        "seed": str(checkpoint.recipe["seed"]),
        "training time": _duration(figures["seconds"]) if "seconds" in figures else "",
        "device": _plain(figures.get("device", "")),
        "PyTorch": _plain(figures.get("torch", "")),
        "commit": _plain(figures.get("commit", "")),
    }
    return [(name, text or "not known") for name, text in facts.items()]


def _network(checkpoint: Checkpoint) -> str:
    """Return the name of the config. Sizes that follow from the data do not matter."""
    config = checkpoint.config
    sizes = {name: getattr(config, name) for name in ("image_channels", "image_size", "classes")}
    return next((name for name, known in CONFIGS.items() if replace(known, **sizes) == config), "own config")


def _classes(counts: Tensor, names: Sequence[str]) -> list[str]:
    """Return the section with the errors of each class, the worst first if there are many."""
    totals = counts.sum(1).tolist()
    missed = (counts.sum(1) - counts.diagonal()).tolist()
    off_diagonal = counts.clone().fill_diagonal_(0)
    order = list(range(len(names)))
    parts = ["## Errors by class"]
    if len(names) > MAX_TABLE_CLASSES:
        order = sorted(order, key=lambda one: -missed[one] / max(1, totals[one]))[:MAX_TABLE_CLASSES]
        parts.append(f"The {MAX_TABLE_CLASSES} worst of {len(names)} classes.")
    rows = []
    for one in order:
        share = f"{100 * missed[one] / totals[one]:.2f} %" if totals[one] else "none to test"
        other = int(off_diagonal[one].argmax())
        often = f"{_plain(names[other])} ({int(off_diagonal[one, other]):,})" if missed[one] else ""
        rows.append((str(one), _plain(names[one]), f"{totals[one]:,}", f"{missed[one]:,}", share, often))
    return [*parts, _table(("#", "class", "in the test", "missed", "error", "most often taken for"), rows)]


def _routing(figures: RoutingFigures) -> list[str]:
    """Return the section on routing: primary lengths, entropy of the couplings, and answers that depend on it."""
    rows = [("mean length of the primary capsules", f"{figures.primary_length:.4f}")]
    rows += [
        (f"entropy of the couplings in iteration {number}", f"{entropy:.4f}")
        for number, entropy in enumerate(figures.entropies, 1)
    ]
    rows.append(("answers that one iteration changes", f"{figures.changed:,} of {figures.images:,}"))
    return [
        "## What routing does",
        f"Measured on the first {figures.images:,} test images. A mean length near 1 says that primary capsules are "
        "present in every image. The entropy of a primary capsule's couplings over its parents is 1 if all are the "
        "same, and 0 if one parent has all. One iteration is routing with uniform couplings.",
        _table(("", ""), rows),
    ]


def _error(errors: int, images: int) -> str:
    return f"{100 * errors / images:.2f} % ({errors:,} of {images:,})"


def _interval(errors: int, images: int) -> str:
    low, high = wilson(errors, images)
    return f"{100 * low:.2f} to {100 * high:.2f} %"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _settings(values: dict[str, object]) -> str:
    return ", ".join(f"{name} {'default' if value is None else _plain(str(value))}" for name, value in values.items())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _plain(text: str) -> str:
    """Return a text in one line with Markdown's characters escaped."""
    return "".join(
        "\\" + character if character in "\\`*_[]<>|#$~" else character for character in " ".join(text.split())
    )


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(
        prog="python -m training.report", description="Write the report of a finished run again, from its checkpoint."
    )
    add_version(command)
    command.add_argument("run", type=parse_path, help="the run's folder")
    command.add_argument(
        "--data", type=parse_path, metavar="FOLDER", help="the folder of images that it was trained on"
    )
    add_file_flags(command)
    options = command.parse_args(arguments)
    try:
        trained = load(options.run / CHECKPOINT_FILE)
        dataset = load_matching(trained, options.data, options.data_dir, source=options.source)
        probabilities, _ = predict(trained.model(), dataset.test_images)
        write_report(options.run, trained, dataset, probabilities)
    except (CheckpointError, DatasetError, ValueError, OSError) as error:
        print(" ".join(reason_of(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    print(f"wrote {options.run / REPORT_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
