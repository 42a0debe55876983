"""Pictures of the report, as PNG files in memory."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from training.claims.jobs import PAPER

DPI = 110
SIZE = (5.2, 3.1)  # inches
TILE_INCHES = 0.62
GAP_PIXELS = 2  # between the images of a table
#: The colour of each kind of network.
COLOURS = {
    "K3": "#1f5fa8",
    "K3n": "#7fb0e0",
    "K1": "#2a9d6f",
    "K1n": "#8fd0b5",
    "C0": "#d8731a",
    "C0r": "#f0b070",
    PAPER: "#8c4a6b",
}
OTHER_COLOUR = "#707070"
WRONG_COLOUR = "#c02020"
#: The words for the kinds of networks in pictures and tables.
LABEL_WIDTH = 13  # letters of a line below one of seven bars
NAMES = {
    "K3": "capsules, routing 3x",
    "K3n": "capsules 3x, no decoder",
    "K1": "capsules, routing 1x",
    "K1n": "capsules 1x, no decoder",
    "C0": "plain",
    "C0r": "plain with decoder",
    PAPER: "plain, as in the paper",
}


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    return content.getvalue()


def axes(title: str, x: str = "", y: str = "") -> tuple[Figure, Axes]:
    """Return a figure with one panel."""
    figure = Figure(figsize=SIZE, layout="constrained")
    panel = figure.add_subplot()
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.spines[["top", "right"]].set_visible(False)
    return figure, panel


def bars(title: str, y: str, values: Mapping[str, Sequence[float]]) -> bytes:
    """Draw a bar of the mean for each name, with a dot for each of its values."""
    figure, panel = axes(title, y=y)
    for place, (name, seen) in enumerate(values.items()):
        mean = sum(seen) / len(seen)
        panel.bar(place, mean, color=COLOURS.get(name, OTHER_COLOUR), width=0.65)
        panel.plot([place] * len(seen), list(seen), "o", color="black", markersize=3.5)
        top = (place, max(mean, *seen))
        panel.annotate(f"{mean:.3g}", top, (0, 4), textcoords="offset points", ha="center", va="bottom", fontsize=9)
    names = [textwrap.fill(NAMES.get(name, name), LABEL_WIDTH) for name in values]
    panel.set_xticks(range(len(values)), names, fontsize=7.5)
    panel.margins(y=0.15)
    return png(figure)


def curves(
    title: str, x: str, y: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], logarithmic: bool = False
) -> bytes:
    """Draw a line through the points (x values, y values) of each name.

    logarithmic: the x axis is, and has the points of the first line.
    """
    figure, panel = axes(title, x, y)
    for name, (across, up) in lines.items():
        panel.plot(across, up, "o-", color=COLOURS.get(name), markersize=3, label=NAMES.get(name, name))
    if logarithmic:
        panel.set_xscale("log")
        points = next(iter(lines.values()))[0]
        panel.set_xticks(points, [f"{point:,}" for point in points])
        panel.minorticks_off()
    panel.legend(fontsize=8, frameon=False)
    return png(figure)


def tiles(
    title: str, images: Sequence[Sequence[NDArray[Any]]], rows: Sequence[str], columns: Sequence[str] = ()
) -> bytes:
    """Draw a table of images, each (H, W) or (H, W, 3) with pixels from 0 to 1, with words for rows and columns.

    All rows have equally many images, and all images the same shape.
    """
    height, width = images[0][0].shape[:2]
    rims = ((0, GAP_PIXELS), (0, GAP_PIXELS), *((0, 0),) * (images[0][0].ndim - 2))
    lines = [np.concatenate([np.pad(one, rims, constant_values=1) for one in line], 1) for line in images]
    whole = np.concatenate(lines, 0)[:-GAP_PIXELS, :-GAP_PIXELS]
    figure = Figure(figsize=(1.4 + TILE_INCHES * len(images[0]), 0.7 + TILE_INCHES * len(images)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panel = figure.add_subplot()
    panel.imshow(whole, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0, labelsize=8, labeltop=True, labelbottom=False)
    panel.set_yticks([height / 2 + number * (height + GAP_PIXELS) for number in range(len(rows))], rows)
    panel.set_xticks([width / 2 + number * (width + GAP_PIXELS) for number in range(len(columns))], columns)
    return png(figure)


class Answered(NamedTuple):
    """An image (H, W), 0 to 1, with its label and a network's answer."""

    image: NDArray[Any]
    label: int
    answer: int


def answers(title: str, rows: Mapping[str, Sequence[Answered]]) -> bytes:
    """Draw images in a row for each kind of network, each with label and answer above it, in red if they differ."""
    wide = max(len(row) for row in rows.values())
    figure = Figure(figsize=(1.3 + 0.62 * wide, 0.5 + 0.8 * len(rows)), layout="constrained")
    figure.suptitle(f"{title}: label → answer", fontsize=10)
    for (kind, row), panels in zip(rows.items(), figure.subplots(len(rows), wide, squeeze=False), strict=True):
        for panel in panels[len(row) :]:
            panel.set_axis_off()
        for one, panel in zip(row, panels, strict=False):
            panel.imshow(one.image, cmap="gray", vmin=0, vmax=1)
            colour = "black" if one.label == one.answer else WRONG_COLOUR
            panel.set_title(f"{one.label} → {one.answer}", fontsize=8, color=colour)
            panel.set_xticks([])
            panel.set_yticks([])
        panels[0].set_ylabel(NAMES[kind].replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=8)
    return png(figure)
