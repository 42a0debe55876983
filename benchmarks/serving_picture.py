"""``python -m benchmarks.serving_picture FIGURES.csv PICTURE.png``: draw the figures of ``benchmarks.serving``."""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

#: A server and its transport: the name and the colour, the same in every picture.
SERVERS = {
    ("ours", "tcp"): ("this server, TCP", "#1f5fa8"),
    ("ours", "unix"): ("this server, Unix socket", "#6fa8dc"),
    ("ours", "tls"): ("this server, TLS", "#0b3d6b"),
    ("mosec", "tcp"): ("mosec", "#d8731a"),
    ("litserve", "tcp"): ("LitServe", "#7a9a3a"),
}
# The parts of a request's CPU time, from the network to the edge, and their greys.
_PARTS = (
    ("infer_us", "CPU time: ONNX Runtime", "#4d4d4d"),
    ("grpc_us", "gRPC and the event loop", "#a6a6a6"),
    ("decode_us", "decoding and encoding", "#d9d9d9"),
    ("stack_us", "", "#d9d9d9"),
    ("encode_us", "", "#d9d9d9"),
)
_BAR = 0.8  # of the space between two loads
_CPU_TRANSPORT = "tcp"

Rows = Sequence[Mapping[str, Any]]


def plot(rows: Rows) -> Figure:
    """Draw three pictures for each network: images a second, latencies, and the CPU time of a request by part."""
    configs = list(dict.fromkeys(row["config"] for row in rows))
    figure = Figure((17, 5.6 * len(configs) + 0.6), layout="constrained")
    axes = figure.subplots(len(configs), 3, squeeze=False, width_ratios=(1.35, 1, 1))
    names: dict[str, str] = {}
    for config, (speeds, latencies, times) in zip(configs, axes, strict=True):
        of_config = [row for row in rows if row["config"] == config and row.get("images_per_second")]
        (ceiling, *_) = [row for row in of_config if row["load"].startswith("ceiling")]
        served = [row for row in of_config if row["server"] != "onnxruntime"]
        names |= _speeds(speeds, served, float(ceiling["images_per_second"]))
        speeds.set_title(f"{config}: images a second, as a share of the ceiling", fontsize=12)
        _latencies(latencies, served)
        _times(times, served)
    _legend(figure, names, "outside upper left")
    _legend(figure, {name: colour for _, name, colour in _PARTS if name}, "outside upper right")
    return figure


def _legend(
    figure: Figure, colours: Mapping[str, str], place: Literal["outside upper left", "outside upper right"]
) -> None:
    """Name the colours in one line above the pictures."""
    patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=patches, loc=place, ncols=len(patches), fontsize=11, frameon=False)


def _speeds(axes: Axes, served: Rows, ceiling: float) -> dict[str, str]:
    """Draw the shares of the ceiling with the images a second, and return the colours of the servers, by name."""
    names = {}
    for row, place, height, (name, colour) in _placed(axes, served):
        share = 100 * float(row["share_of_ceiling"])
        axes.barh(place, share, height, color=colour)
        speed = f"{float(row['images_per_second']):,.0f}"
        axes.text(share + 0.8, place, speed, va="center", fontsize=8, bbox={"color": "white", "pad": 0.6})
        names[name] = colour
    axes.axvline(100, color="black", linewidth=1, zorder=0.5)
    text = f"ceiling:\nONNX Runtime\nalone, {ceiling:,.0f}\nimages a second"
    axes.text(101, axes.get_ylim()[1] + 0.1, text, va="top", fontsize=9)
    axes.set_xlim(0, 132)
    axes.set_xlabel("% of the ceiling; the numbers at the bars are images a second", fontsize=10)
    return names


def _latencies(axes: Axes, served: Rows) -> None:
    """Draw a line from the median to the 99th percentile of each load, with a point at the 95th."""
    for row, place, _, (_, colour) in _placed(axes, served, labelled=False):
        median, high, highest = (float(row[f"p{percent}_ms"]) for percent in (50, 95, 99))
        axes.plot([median, highest], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot([median], [place], "|", color=colour, markersize=9, markeredgewidth=2)
        axes.plot([high], [place], "o", color=colour, markersize=4.5)
    axes.set_xscale("log")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("milliseconds", fontsize=10)
    axes.set_title("latency: tick p50, point p95, end of the line p99", fontsize=12)


def _times(axes: Axes, served: Rows) -> None:
    """Draw the server's CPU time for a request of one image, in its parts."""
    split = [row for row in served if row.get("grpc_us") and str(row["images"]) == "1"]
    split = [row for row in split if row["transport"] == _CPU_TRANSPORT] or split
    for place, row in enumerate(split):
        left = 0.0
        for part, _, colour in _PARTS:
            width = float(row.get(part) or 0)
            axes.barh(place, width, _BAR, left=left, color=colour)
            left += width
        axes.text(left, place, f" {left:,.0f}", va="center", fontsize=9)
    axes.set_yticks(range(len(split)), [row["load"] for row in split], fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * axes.get_xlim()[1])
    axes.set_xlabel("microseconds", fontsize=10)
    axes.set_title("CPU time of this server for a request", fontsize=12)


def _placed(
    axes: Axes, served: Rows, labelled: bool = True
) -> list[tuple[Mapping[str, Any], float, float, tuple[str, str]]]:
    """Return each row with the place and height of its bar, and its server's name and colour.

    The loads are the labels of the vertical axis, from the top. Servers of one load are side by side.
    """
    loads = list(dict.fromkeys(row["load"] for row in served))
    servers = list(dict.fromkeys((row["server"], row["transport"]) for row in served))
    height = _BAR / len(servers)
    axes.set_yticks(range(len(loads)), loads if labelled else [""] * len(loads), fontsize=10)
    axes.set_ylim(len(loads) - 0.4, -0.6)
    placed = []
    for row in served:
        server = row["server"], row["transport"]
        place = loads.index(row["load"]) - _BAR / 2 + (servers.index(server) + 0.5) * height
        placed.append((row, place, height, SERVERS[server]))
    return placed


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.serving_picture", description=__doc__)
    command.add_argument("figures", type=Path, help="a CSV file that benchmarks.serving wrote")
    command.add_argument("picture", type=Path, help="the PNG file")
    options = command.parse_args(arguments)
    try:
        with options.figures.open(newline="") as file:
            rows = list(csv.DictReader(file))
        plot(rows).savefig(options.picture, dpi=100)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
