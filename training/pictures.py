"""``python -m training.pictures``: look at what a network's decoder makes of its poses, in one picture.

Reconstructions, and what each dimension of a pose stands for, as figures 3 and 4 and section 5.1 of "Dynamic Routing
Between Capsules" show them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from training.checkpoint import CheckpointError, load
from training.data.datasets import NAMES, DatasetError
from training.data.of_checkpoint import of_checkpoint
from training.evaluate import most_probable, predict, wrong
from training.model import CapsNet

OFFSETS = tuple(step / 20 for step in range(-5, 6))  # added to a pose's dimension: -0.25 to +0.25 (section 5.1)
RECONSTRUCTED_CLASSES = 10
DPI = 120
WRONG = "#b01818"
FAINT = "#707070"

Pixels = NDArray[np.float32]

_TILE = 0.62  # inches
_HEADER = 0.9  # inches between the reconstructions and the sweep
_SLANTED_CHARACTER = 0.036  # inches that each character of a slanted text adds to its height
_UPRIGHT_CHARACTERS = 8  # that fit above a tile
_NO_DECODER = "the network has no decoder (decoder_widths=()), so there is nothing to draw"
_NAME_CHARACTERS = 18
_BATCH = 250


class PictureError(ValueError):
    """There is nothing to draw of what was asked for; the text says why."""


def drawable(names: Sequence[str]) -> list[str]:
    """Class names as pictures show them: shortened, or ``#number`` where the font lacks one of the characters."""
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
    """Images (..., C, H, W), uint8 or float from 0 to 1, as (..., H, W, 3) from 0 to 1.

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
    """Rows of images (R, N, H, W, 3) as one of (R*(H+gap), N*(W+gap), 3): each has white to its right and below."""
    rows, columns, height, width, _ = images.shape
    gap = _gap(height)
    padded = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=1)
    joined: Pixels = padded.swapaxes(1, 2).reshape(rows * (height + gap), columns * (width + gap), 3)
    return joined


def _gap(size: int) -> int:
    return max(1, round(size / 14))


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, cropped to what is drawn; the same bytes for the same figure."""
    figure.savefig(path, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.15, metadata={"Software": None})


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in inches from the upper left corner of a figure."""
    total_width, total_height = figure.get_size_inches()
    place = (left / total_width, 1 - (top + height) / total_height, width / total_width, height / total_height)
    return figure.add_axes(place)


def first_of_each_class(labels: Tensor, classes: int, most: int = RECONSTRUCTED_CLASSES) -> list[int]:
    """The first image of each of the first ``most`` classes that have one; labels: (M,) or (M, K)."""
    labels = labels.reshape(len(labels), -1)
    present = (torch.nonzero((labels == one).any(1)).flatten() for one in range(classes))
    firsts = [int(indices[0]) for indices in present if len(indices)]
    return list(dict.fromkeys(firsts))[:most]  # an image of several objects may be the first of two classes


def first_right(model: CapsNet, images: Tensor, labels: Tensor, category: int | None = None) -> int | None:
    """The first image, of a class if given, that is classified right; None where there is none.

    images: uint8 (M, C, H, W); labels: (M,) or (M, K). Runs the network no further than to that image's batch.
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
    """What the decoder makes of the poses (B, J, E) of the classes (B,): (B, C, H, W), 0 to 1, on the CPU.

    Raises PictureError for a network without a decoder.
    """
    if model.decoder is None:
        raise PictureError(_NO_DECODER)
    device = next(model.parameters()).device
    pixels: Tensor = model.decoder(poses.to(device), classes.to(device)).cpu()
    return pixels


def sweep(model: CapsNet, poses: Tensor, category: int) -> Tensor:
    """Reconstructions of one image with each dimension of one class's pose changed by each of OFFSETS.

    poses: (J, E), of which only the pose of ``category`` counts. Returns (E, len(OFFSETS), C, H, W), 0 to 1.
    """
    dimensions = poses.shape[1]
    changes = torch.eye(dimensions).unsqueeze(1) * torch.tensor(OFFSETS).reshape(1, -1, 1)  # (E, offsets, E)
    changed = poses.repeat(dimensions, len(OFFSETS), 1, 1)  # (E, offsets, J, E)
    changed[:, :, category] += changes
    flat = changed.flatten(0, 1)
    pixels = reconstruct(model, flat, torch.full((len(flat),), category))
    return pixels.reshape(dimensions, len(OFFSETS), *pixels.shape[1:])


def decoder_picture(model: CapsNet, names: Sequence[str], images: Tensor, labels: Tensor, chosen: int) -> Figure:
    """Reconstructions of one image of each class, and the sweep of each pose dimension of image ``chosen``.

    names: of the J classes; images: uint8 (M, C, H, W); labels: int64 (M,), or (M, K) of images with K objects, each
    of which is reconstructed from one of the K longest capsules. The sweep is of the longest capsule. The network
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
    """To two digits, with no negative zero."""
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

    below: of each column, what is written under it in red.
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


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m training.pictures",
        description="Draw reconstructions of test images, and what each dimension of a pose changes in one of them.",
    )
    result.add_argument("checkpoint", type=Path, help="the checkpoint that training wrote, capsnet.pt")
    source = result.add_mutually_exclusive_group()
    source.add_argument("--dataset", choices=NAMES, help="whose test images (default: what the network was trained on)")
    source.add_argument("--data", type=Path, metavar="FOLDER", help="or a folder of your own images")
    result.add_argument("--data-dir", type=Path, metavar="FOLDER", help="a folder with the dataset's files")
    which = result.add_mutually_exclusive_group()
    which.add_argument("--image", type=int, metavar="N", help="number of the test image whose pose is changed, from 0")
    which.add_argument(
        "--class", dest="category", metavar="NAME", help="or the first of this class that is classified right"
    )
    result.add_argument(
        "--out",
        type=Path,
        default=Path("decoder.png"),
        metavar="FILE",
        help="the picture, a PNG file (default: decoder.png)",
    )
    return result


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        trained = load(options.checkpoint)
        try:
            model = trained.model()
        except CheckpointError as error:
            raise CheckpointError(f"{options.checkpoint}: {error}") from error
        if model.decoder is None:
            raise PictureError(f"{options.checkpoint}: {_NO_DECODER}")
        if options.category is not None and options.category not in trained.labels:
            raise PictureError(f"--class {options.category}: expected one of {', '.join(trained.labels)}")
        dataset = of_checkpoint(trained, options.data, options.data_dir, options.dataset)
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
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
