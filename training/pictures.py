"""The pictures of a run: curves, confusion matrix, worst mistakes, and reconstructions from poses.

``python -m training.pictures`` draws the last of these: reconstructions, and the effect of each pose dimension, as in
figures 3 and 4 and section 5.1 of "Dynamic Routing Between Capsules".
"""

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray
from torch import Tensor

from serving.files.program import add_version, parse_path, reason_of
from training.checkpoint import CheckpointError, load
from training.data.compose import combine
from training.data.matching import load_matching
from training.data.sources import DatasetError, add_file_flags
from training.data.specs import NAMES
from training.evaluate import by_confidence, most_probable, predict, wrong
from training.model import CapsNet, to_pixels
from training.run_folder import checkpoint_path

OFFSETS = tuple(step / 20 for step in range(-5, 6))  # added to a pose's dimension: -0.25 to +0.25 (section 5.1)
MAX_RECONSTRUCTED_CLASSES = 10
MAX_DRAWN_MISTAKES = 40
MISTAKES_A_ROW = 8
DPI = 120
WRONG = "#b01818"
FAINT = "#707070"

# What is drawn of the logs: the panel, the curve's name and its colour. Held-out figures are of the averaged weights.
CURVES = {
    "classification_loss_epoch": ("classification loss", "training", "#1f5fa8"),
    "held_out_loss": ("classification loss", "held out", "#d8731a"),
    "reconstruction_loss_epoch": ("reconstruction loss", "training", "#1f5fa8"),
    "held_out_error_percent": ("held-out error, %", "held out", "#d8731a"),
}

Pixels = NDArray[np.float32]

_TILE = 0.62  # inches
_HEADER = 0.9  # inches between the reconstructions and the sweep
_SLANTED_CHARACTER = 0.036  # inches that each character of a slanted text adds to its height
_UPRIGHT_CHARACTERS = 8  # that fit above a tile
_NO_DECODER = "the network has no decoder (decoder_widths=()), so there is nothing to draw"
_NOT_LEARNED = "The decoder has not learned yet: it draws nearly the same for every image"
_MIN_LEARNED_VARIATION = 0.1
_NAME_CHARACTERS = 18
_BATCH = 250


class PictureError(ValueError):
    """The requested picture cannot be drawn. The text says why."""


def drawable(names: Sequence[str]) -> list[str]:
    """Return class names for pictures: shortened, or ``#number`` if the font lacks a character."""
    known = get_font(findfont(FontProperties())).get_charmap()
    return [
        f"#{number}"
        if not name or any(ord(character) not in known for character in name)
        else name
        if len(name) <= _NAME_CHARACTERS
        else name[: _NAME_CHARACTERS - 1] + "…"
        for number, name in enumerate(names)
    ]


def to_rgb(images: Tensor) -> Pixels:
    """Return images (..., C, H, W), uint8 or float from 0 to 1, as (..., H, W, 3) from 0 to 1.

    One channel is grey, three are a colour; any other number of channels becomes grey images side by side.
    """
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    channels = pixels.shape[-3]
    if channels not in (1, 3):
        pixels = torch.cat(pixels.unbind(-3), dim=-1).unsqueeze(-3)
    if channels != 3:
        pixels = pixels.expand(*pixels.shape[:-3], 3, *pixels.shape[-2:])
    rgb: Pixels = pixels.movedim(-3, -1).numpy()
    return rgb


def mosaic(images: Pixels) -> Pixels:
    """Join rows of images (R, N, H, W, 3) to one of (R*(H+gap), N*(W+gap), 3), with white to the right and below."""
    rows, columns, height, width, _ = images.shape
    gap = _gap(height)
    padded = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=1)
    joined: Pixels = padded.swapaxes(1, 2).reshape(rows * (height + gap), columns * (width + gap), 3)
    return joined


def _gap(size: int) -> int:
    return max(1, round(size / 14))


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, cropped to its content. The same figure gives the same bytes."""
    figure.savefig(path, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.15, metadata={"Software": None})


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Return axes at a position in inches from the upper left corner of a figure."""
    total_width, total_height = figure.get_size_inches()
    place = (left / total_width, 1 - (top + height) / total_height, width / total_width, height / total_height)
    return figure.add_axes(place)


def first_of_each_class(labels: Tensor, classes: int, maximum: int = MAX_RECONSTRUCTED_CLASSES) -> list[int]:
    """Return the first image of each of the first ``maximum`` classes that have one; labels: (M,) or (M, K)."""
    labels = labels.reshape(len(labels), -1)
    present = (torch.nonzero((labels == one).any(1)).flatten() for one in range(classes))
    firsts = [int(indices[0]) for indices in present if len(indices)]
    return list(dict.fromkeys(firsts))[:maximum]  # an image of several objects may be the first of two classes


def first_right(model: CapsNet, images: Tensor, labels: Tensor, category: int | None = None) -> int | None:
    """Return the index of the first correctly classified image, of a class if given, or None.

    images: uint8 (M, C, H, W); labels: (M,) or (M, K). The network runs only up to that image's batch.
    """
    chosen = torch.arange(len(labels))
    if category is not None:
        chosen = chosen[(labels.reshape(len(labels), -1) == category).any(1)]
    for part in torch.split(chosen, _BATCH):
        right = part[~wrong(predict(model, images[part])[0], labels[part])]
        if len(right):
            return int(right[0])
    return None


@torch.inference_mode()
def reconstruct(model: CapsNet, poses: Tensor, classes: Tensor) -> Tensor:
    """Decode the poses (B, J, E) of the classes (B,) to images (B, C, H, W), 0 to 1, on the CPU.

    Raises PictureError for a network without a decoder.
    """
    if model.decoder is None:
        raise PictureError(_NO_DECODER)
    device = next(model.parameters()).device
    pixels: Tensor = model.decoder(poses.to(device), classes.to(device)).cpu()
    return pixels


def sweep(model: CapsNet, poses: Tensor, category: int) -> Tensor:
    """Reconstruct one image with each dimension of one class's pose changed by each of OFFSETS.

    poses: (J, E); only the pose of ``category`` is used. Returns (E, len(OFFSETS), C, H, W), 0 to 1.
    """
    dimensions = poses.shape[1]
    changes = torch.eye(dimensions).unsqueeze(1) * torch.tensor(OFFSETS).reshape(1, -1, 1)  # (E, offsets, E)
    changed = poses.repeat(dimensions, len(OFFSETS), 1, 1)  # (E, offsets, J, E)
    changed[:, :, category] += changes
    flat = changed.flatten(0, 1)
    pixels = reconstruct(model, flat, torch.full((len(flat),), category))
    return pixels.reshape(dimensions, len(OFFSETS), *pixels.shape[1:])


def decoder_has_learned(model: CapsNet, images: Tensor, labels: Tensor, classes: int) -> bool:
    """Return False if reconstructions of the first image of each class vary much less than these images.

    images: uint8 (M, C, H, W); labels: (M,), or (M, K). Returns True where the images do not vary. Raises PictureError
    for a network without a decoder.
    """
    shown = images[first_of_each_class(labels, classes)]
    if len(shown) < 2:
        return True
    probabilities, poses = predict(model, shown)
    answers = most_probable(probabilities, labels.reshape(len(labels), -1).shape[1])
    rebuilt = combine(torch.stack([reconstruct(model, poses, one) for one in answers.unbind(1)], 1))
    return float(rebuilt.var(0).mean()) >= _MIN_LEARNED_VARIATION * float(to_pixels(shown).var(0).mean())


def decoder_picture(model: CapsNet, names: Sequence[str], images: Tensor, labels: Tensor, chosen: int) -> Figure:
    """Draw reconstructions of one image of each class, and the sweep of each pose dimension of image ``chosen``.

    names: of the J classes; images: uint8 (M, C, H, W); labels: int64 (M,), or (M, K) of images with K objects: each
    object is reconstructed from one of the K longest capsules. The sweep is of the longest capsule. The network
    sees the images that are drawn and no others. Raises PictureError for a network without a decoder, or where there
    is no image ``chosen``.
    """
    if not 0 <= chosen < len(images):
        raise PictureError(f"image {chosen}; the test set has the images 0 to {len(images) - 1}")
    names = drawable(names)
    objects = labels.reshape(len(labels), -1).sort(1).values  # (M, K)
    shown = first_of_each_class(labels, len(names))
    probabilities, poses = predict(model, images[[*shown, chosen]])
    answers = most_probable(probabilities, objects.shape[1])  # (B, K)
    rebuilt = [reconstruct(model, poses[:-1], classes) for classes in answers[:-1].unbind(1)]
    longest = int(probabilities[-1].argmax())
    swept = to_rgb(sweep(model, poses[-1], longest))
    samples = np.stack([to_rgb(images[shown]), *map(to_rgb, rebuilt)])

    row_names = ["reconstruction"] if len(rebuilt) == 1 else [f"reconstruction {n + 1}" for n in range(len(rebuilt))]
    below = []
    for index, answer in zip(shown, answers, strict=False):
        right = answer.equal(objects[index])
        below.append("" if right else "→ " + _joined(names, answer))
    top = len(samples) * _TILE + _HEADER + max(map(len, below)) * _SLANTED_CHARACTER
    height = top + len(swept) * _TILE
    figure = Figure(figsize=(len(OFFSETS) * _TILE, height))
    _tiles(figure, 0, samples, ["image", *row_names], [_joined(names, objects[index]) for index in shown], below)

    thumbnail = to_rgb(images[chosen])
    left = -(thumbnail.shape[1] / thumbnail.shape[0] + 0.08) * _TILE
    _tiles(figure, top - 1.08 * _TILE, thumbnail[None, None], [""], [""], left=left)
    if not decoder_has_learned(model, images, labels, len(names)):
        figure.text(0, 1 - (top - 0.58) / height, _NOT_LEARNED, fontsize=10, color=WRONG)
    figure.text(
        0,
        1 - (top - 0.34) / height,
        f"Test image {chosen} ({_joined(names, objects[chosen])}), pose of {names[longest]}, "
        f"length {probabilities[-1, longest]:.2f}: one dimension changed by",
        fontsize=10,
        parse_math=False,
    )
    row_names = [f"dimension {number}  {value:+.2f}" for number, value in enumerate(_rounded(poses[-1, longest]))]
    column_names = [f"{offset:+.2f}" if offset else "0" for offset in OFFSETS]
    axes = _tiles(figure, top, swept, row_names, column_names)
    side, gap = swept.shape[3], _gap(swept.shape[2])
    corner = (OFFSETS.index(0) * (side + gap) - gap / 2 - 0.5, -gap / 2 - 0.5)
    bottom = len(swept) * (swept.shape[2] + gap)
    axes.add_patch(Rectangle(corner, side + gap, bottom, fill=False, edgecolor=WRONG, linewidth=1.6, clip_on=False))
    return figure


def _rounded(values: Tensor) -> list[float]:
    """Round to two digits, with no negative zero."""
    return [round(value, 2) + 0.0 for value in values.tolist()]


def _joined(names: Sequence[str], classes: Tensor) -> str:
    return " + ".join(names[one] for one in classes.tolist())


def _tiles(
    figure: Figure,
    top: float,
    images: Pixels,
    row_names: Sequence[str],
    column_names: Sequence[str],
    below: Sequence[str] = (),
    *,
    left: float = 0,
) -> Axes:
    """Draw rows of images (R, N, H, W, 3), ``left`` and ``top`` in inches, with names of rows and columns.

    below: the red text under each column.
    """
    rows, columns, height, width, _ = images.shape
    gap = _gap(height)
    axes = axes_at(figure, left, top, columns * _TILE * width / height, rows * _TILE)
    axes.imshow(mosaic(images), aspect="auto")
    axes.set_yticks(
        [row * (height + gap) + (height - 1) / 2 for row in range(rows)], row_names, fontsize=9, parse_math=False
    )
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    slant = 30 if max(map(len, [*column_names, *below])) > _UPRIGHT_CHARACTERS else 0
    for texts, y, distance, colour in (
        (column_names, -0.5, 4, "black"),
        (below, rows * (height + gap) - gap, -2, WRONG),
    ):
        for column, text in enumerate(texts):
            axes.annotate(
                text,
                (column * (width + gap) + (width - 1) / 2, y),
                (0, distance),
                textcoords="offset points",
                fontsize=9,
                color=colour,
                ha="left" if slant else "center",
                va="bottom" if distance > 0 else "top",
                rotation=slant if distance > 0 else -slant,
                rotation_mode="anchor",
                parse_math=False,
            )
    return axes


def curves_picture(curves: dict[str, dict[int, float]], selected: int | None = None) -> Figure:
    """Draw losses and held-out error by epoch, one panel for each that exists. selected: the kept epoch."""
    panels = list(dict.fromkeys(CURVES[name][0] for name in curves))
    figure = Figure(figsize=(4.2 * len(panels), 3.3), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        drawn = {name: values for name, values in curves.items() if CURVES[name][0] == panel}
        for name, values in drawn.items():
            _, title, colour = CURVES[name]
            marker = "o" if len(values) <= 25 else ""  # without it, a run of one epoch would show nothing
            axes.plot(list(values), list(values.values()), color=colour, label=title, marker=marker, markersize=3.5)
        everything = [value for values in drawn.values() for value in values.values()]
        if "loss" in panel and max(everything) > 5 * min(everything) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif min(everything) >= 0:
            axes.set_ylim(bottom=0)
        if selected is not None:
            axes.axvline(selected, color=FAINT, linestyle=":", linewidth=1.2, label=f"kept: epoch {selected}")
        last = max(epoch for values in drawn.values() for epoch in values)
        axes.set_xlim(0.5, last + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        axes.set_xlabel("epoch")
        axes.set_title(panel, fontsize=11)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9, frameon=False)
    return figure


def confusion_picture(counts: Tensor, names: Sequence[str]) -> Figure:
    """Draw the confusion matrix (J, J) with its counts, rows for labels.

    Only mistakes have a colour, by the square root of their number, so that the diagonal does not hide them and a
    frequent mistake does not hide a rare one.
    """
    names, classes = drawable(names), len(counts)
    cell = min(0.62, max(0.26, 7 / classes))  # inches
    side = cell * classes
    figure = Figure(figsize=(side, side))
    axes = axes_at(figure, 0, 0, side, side)
    off_diagonal = counts.clone().fill_diagonal_(0)
    norm = PowerNorm(0.5, vmin=0, vmax=max(5, int(off_diagonal.max())))
    axes.imshow(np.ma.masked_equal(off_diagonal.numpy(), 0), cmap="Reds", norm=norm)
    largest = len(str(int(counts.max())))
    size = min(11.0, 72 * cell / (0.72 * max(2, largest)))  # points, so that the largest number fits its cell
    for row, column in counts.nonzero().tolist():
        count = int(counts[row, column])
        if row == column:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="#ececec"))
        colour = FAINT if row == column else "white" if norm(count) > 0.6 else "black"
        text = axes.text(column, row, str(count), ha="center", va="center", fontsize=size, color=colour)
        text.set_in_layout(False)  # it is inside the axes; measuring thousands takes long
    upright = classes <= 30 and max(map(len, names)) * 0.075 < cell
    points = min(10.0, 62 * cell)
    axes.set_xticks(range(classes), names, fontsize=points, parse_math=False)
    axes.set_yticks(range(classes), names, fontsize=points, parse_math=False)
    if not upright:
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xticks([edge - 0.5 for edge in range(1, classes)], minor=True)
    axes.set_yticks([edge - 0.5 for edge in range(1, classes)], minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("predicted", fontsize=11)
    axes.set_ylabel("label", fontsize=11)
    mistakes = int(off_diagonal.sum())
    title = f"{mistakes:,} {'mistake' if mistakes == 1 else 'mistakes'} among {int(counts.sum()):,} test labels"
    axes.set_title(title, fontsize=11, loc="left")
    return figure


def mistakes_picture(images: Tensor, labels: Tensor, probabilities: Tensor, names: Sequence[str]) -> Figure:
    """Draw the worst mistakes, up to MAX_DRAWN_MISTAKES in the order of ``by_confidence``, or a text if there are none.

    Each with its number, its label or labels above and the answer below, and their capsules' lengths. images: uint8
    (M, C, H, W); labels: (M,) or (M, K); probabilities: (M, J).
    """
    names = drawable(names)
    objects = labels.reshape(len(labels), -1).sort(1).values
    mistakes = by_confidence(probabilities, labels)
    if not mistakes:
        figure = Figure(figsize=(6, 0.8))
        text = f"No mistakes: all {len(labels):,} test images are classified right."
        figure.text(0.5, 0.5, text, fontsize=13, ha="center", va="center")
        return figure
    drawn = mistakes[:MAX_DRAWN_MISTAKES]
    lines = objects.shape[1]
    answers = most_probable(probabilities, lines)
    above, below = (
        [
            "\n".join(f"{names[one]}  {probabilities[index, one]:.2f}" for one in these[index].tolist())
            for index in drawn
        ]
        for these in (objects, answers)
    )
    columns = min(MISTAKES_A_ROW, len(drawn))
    side, line = 1.05, 0.155  # inches of an image and of a line of text
    widest = max(len(one) for text in (*above, *below) for one in text.split("\n"))
    across = max(side, widest * 0.072) + 0.16
    down = side + (2 * lines + 1) * line + 0.2
    header = 0.55 + (1 + lines) * line
    height = header + math.ceil(len(drawn) / columns) * down
    figure = Figure(figsize=(columns * across, height))
    total = f"{len(mistakes):,} {'mistake' if len(mistakes) == 1 else 'mistakes'} in {len(labels):,} test images"
    title = f"The {len(drawn)} most confident of {total}" if len(drawn) < len(mistakes) else total
    key = "Above the label, below the network's answer, with the lengths of their capsules"
    figure.text(0, 1 - 0.15 / height, title, fontsize=12, va="center")
    figure.text(0, 1 - 0.37 / height, key, fontsize=9, va="center", color=FAINT)
    for place, index in enumerate(drawn):
        row, column = divmod(place, columns)
        axes = axes_at(figure, column * across, header + row * down, side, side)
        axes.imshow(to_rgb(images[index]))
        axes.set_axis_off()
        write = partial(axes.text, fontsize=8.5, linespacing=1.15, transform=axes.transAxes, parse_math=False)
        write(0, 1.03, f"image {index}\n{above[place]}", va="bottom")
        write(0, -0.03, below[place], va="top", color=WRONG)
    return figure


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m training.pictures",
        description="Draw reconstructions of test images, and what each dimension of a pose changes in one of them.",
    )
    add_version(result)
    result.add_argument("checkpoint", type=parse_path, help="the run's folder, or the checkpoint capsnet.pt in it")
    source = result.add_mutually_exclusive_group()
    source.add_argument("--dataset", choices=NAMES, help="whose test images (default: what the network was trained on)")
    source.add_argument("--data", type=parse_path, metavar="FOLDER", help="or a folder of your own images")
    add_file_flags(result)
    which = result.add_mutually_exclusive_group()
    which.add_argument("--image", type=int, metavar="N", help="number of the test image whose pose is changed, from 0")
    which.add_argument(
        "--class", dest="category", metavar="NAME", help="or the first of this class that is classified right"
    )
    result.add_argument(
        "--out",
        type=parse_path,
        default=Path("decoder.png"),
        metavar="FILE",
        help="the picture, a PNG file (default: decoder.png)",
    )
    return result


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        trained = load(checkpoint_path(options.checkpoint))
        try:
            model = trained.model()
        except CheckpointError as error:
            raise CheckpointError(f"{options.checkpoint}: {error}") from error
        if model.decoder is None:
            raise PictureError(f"{options.checkpoint}: {_NO_DECODER}")
        if options.category is not None and options.category not in trained.labels:
            raise PictureError(f"--class {options.category}: expected one of {', '.join(trained.labels)}")
        dataset = load_matching(trained, options.data, options.data_dir, options.dataset, options.source)
        images, labels = dataset.test_images, dataset.test_labels
        chosen = options.image
        if chosen is None:
            category = None if options.category is None else trained.labels.index(options.category)
            chosen = first_right(model, images, labels, category)
        if chosen is None:
            of_class = "" if options.category is None else f" of class {options.category}"
            raise PictureError(f"no test image{of_class} is classified right; choose one with --image N")
        save(decoder_picture(model, trained.labels, images, labels, chosen), options.out)
    except (CheckpointError, DatasetError, PictureError, OSError) as error:
        print(" ".join(reason_of(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
