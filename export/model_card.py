"""``python -m export.model_card MODEL/VERSION...``: write the model card of each artifact, ``MODEL/README.md``.

All figures come from the artifact's manifest. The sections are those of Mitchell et al., "Model Cards for Model
Reporting", 2019. The block at the top has the fields of Hugging Face's cards.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from serving.artifact import Artifact, ArtifactError, Calibration, load

CARD = "README.md"


class _Kind(NamedTuple):
    """Texts of a card for the networks of one data set. ``data`` follows "Trained on"."""

    use: str
    limits: str
    data: str


_KINDS = {
    "mnist": _Kind(
        "One handwritten digit in an image, white on black and centred as in MNIST. With `preprocess: AUTO` the server "
        "brings photographs and drawings to that look first.",
        "It knows digits of MNIST's kind alone. Other pens, cameras and scripts were not measured, except the "
        "photographs and drawings that docs/accuracy.md names. Several digits in an image are suspicious to it, not "
        "read. An image can be made so that the network takes it for another class: do not use the answers where "
        "someone gains by a wrong one, such as on cheques.",
        "MNIST: digits of employees of the US Census Bureau and of US high-school students, about 1990. Writing of "
        "other countries, ages and times is missing from it. The data set names no writer.",
    ),
    "multimnist": _Kind(
        "Two overlapping handwritten digits of different classes, white on black. The two longest capsules are the "
        "answer.",
        "It finds digits everywhere: only the reconstruction error, which a request asks for, tells other images from "
        "pairs of digits. A digit alone is often taken for two. Two digits of the same class, three digits, and digits "
        "that do not overlap were not measured.",
        "MultiMNIST: pairs of MNIST's digits, each moved by up to four pixels and added, composed during the training. "
        "MNIST has the digits of employees of the US Census Bureau and of US high-school students, about 1990.",
    ),
}
_OTHER_KIND = _Kind(
    "One object in an image of the look of its training images, of one of the classes above.",
    "It was tested on the test images of its own data alone.",
    "images that this card cannot describe: the person who exported the network knows them.",
)
_HEAD = """---
license: apache-2.0
library_name: onnx
pipeline_tag: image-classification
tags: [capsule-network, onnx, capsnet-serving]
datasets: [{dataset}]
metrics: [error-rate]
---"""


def card(artifact: Artifact) -> str:
    """Return the model card of an artifact."""
    training = artifact.training
    kind = _KINDS.get(training.dataset, _OTHER_KIND)
    parts = [
        _HEAD.format(dataset=training.dataset),
        f"# Model card: {artifact.name}, version {artifact.version}",
        _table(("", ""), _facts(artifact)),
        f"## Use\n\n{kind.use}",
        f"## Limits\n\n{kind.limits}",
        f"## Data\n\nTrained on {kind.data} The notices of the data are in `NOTICE` of the project.",
        f"## Training\n\n{_training_text(artifact)}",
        "## Metrics\n\nNo choice depended on the test images. Another seed of the same recipe gives other figures. "
        "Each graph was run in the server's runtime; "
        f"[the certificate]({artifact.version}/CERTIFICATE.md) compares it with PyTorch image by image.",
        _table(
            ("precision", "test error", "bytes"),
            [(name, one.test_error, f"{one.bytes:,}") for name, one in artifact.variants.items()],
        ),
    ]
    if artifact.calibration:
        parts += _calibration_parts(artifact.calibration)
    return "\n\n".join(parts) + "\n"


def _facts(artifact: Artifact) -> list[tuple[str, str]]:
    """Return the rows of a card's first table."""
    channels, height, width = artifact.image_shape
    pixels = f"{height} x {width} pixels, {'grey' if channels == 1 else f'{channels} channels'}"
    every = int(artifact.training.figures["parameters"])
    decoder = _decoder_parameters(artifact.training.config, channels * height * width)
    config = artifact.training.config
    return [
        ("input", pixels),
        ("classes", ", ".join(artifact.labels)),
        ("output of each class", f"the length of its capsule, from 0 to 1, and a pose of {artifact.pose_size} numbers"),
        ("kind", f"capsule network (Sabour, Frosst, Hinton, 2017), {config['routing_iterations']} routing iterations"),
        ("parameters", f"{every - decoder:,}, and {decoder:,} of the decoder"),
        ("graphs", ", ".join((*artifact.variants, *artifact.graphs))),
        ("licence", "Apache-2.0"),
    ]  # fmt: skip


def _decoder_parameters(config: Mapping[str, object], pixels: int) -> int:
    """Return the number of the decoder's weights and biases. pixels: the size of its image."""
    widths = config["decoder_widths"]
    assert isinstance(widths, Sequence)
    if not widths:
        return 0
    sizes = (int(str(config["classes"])) * int(str(config["digit_dim"])), *map(int, widths), pixels)
    return sum((before + 1) * after for before, after in pairwise(sizes))


def _training_text(artifact: Artifact) -> str:
    figures, recipe = artifact.training.figures, artifact.training.recipe
    text = (
        f"{figures['train_images']:,} training images, {recipe['epochs']} epochs ({figures['images_seen']:,} images), "
        f"batches of {recipe['batch_size']}, precision {recipe['precision']}, seed {recipe['seed']}: "
        f"{figures['seconds']:.0f} seconds on {figures['device']}, with PyTorch {figures['torch']} and the code of "
        f"commit {figures['commit']}."
    )
    if recipe.get("distil"):
        text += " It also learned the lengths that other networks gave."
    return f"{text}\n\n```text\n{figures['command']}\n```"


def _calibration_parts(calibration: Calibration) -> list[str]:
    """Return the sections about confidences and about images that show none of the classes."""
    length, confidence = 100 * calibration.ece["length"], 100 * calibration.ece["confidence"]
    findings = list(next(iter(calibration.detected.values())))
    rows = [
        (kind, *(f"{100 * shares[finding]:.1f} %" for finding in findings))
        for kind, shares in calibration.detected.items()
    ]
    return [
        "## Calibration\n\nA capsule's length is no probability. The server computes confidences from the lengths, "
        f"with a temperature of {calibration.temperature:g}; the certificate has the formula. On the test images a "
        f"confidence is wrong by {confidence:.2f} points on average, and a length by {length:.2f} (expected "
        f"calibration error). The temperature and the thresholds were measured on {calibration.images:,} images: "
        f"{calibration.source}.",
        "## Other images\n\nThe share of the images with no present class, with several, with a suspicious answer, and "
        "with a confident one:",
        _table(("images", *findings), rows),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the cards, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m export.model_card", description="Write the model cards of artifacts."
    )
    parser.add_argument("versions", nargs="+", type=Path, metavar="MODEL/VERSION", help="folder of an artifact")
    for folder in parser.parse_args(arguments).versions:
        try:
            text = card(load(folder))
        except ArtifactError as error:
            print(error, file=sys.stderr)
            return 1
        (folder.parent / CARD).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
