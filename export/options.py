"""The options of an export, one field for each: its flag, default, choices, help and check.

This module does not import PyTorch, which takes seconds, so that a wrong choice is refused at once.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from serving.files.options import check, option
from serving.tensorrt_options import BatchProfile
from training.data.sources import DATA_DIR_HELP, SOURCE_HELP, check_places, parse_folder, parse_managers

DECODER_WEIGHTS = ("fp32", "int8")
_OPTIONAL_PRECISIONS = ("int8", "fp16")
OPSETS = range(18, 26)  # the versions to which PyTorch's exporter converts by itself
OPSET = 20
BATCHES = BatchProfile(1, 8, 32)


def parse_name(text: str) -> str:
    if not re.fullmatch("[a-z0-9][a-z0-9-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}; expected lower-case letters, digits and hyphens")
    return text


def parse_version(text: str) -> str:
    if not re.fullmatch("[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a positive integer")
    return text


def parse_precision(text: str) -> str:
    if text not in _OPTIONAL_PRECISIONS:
        raise argparse.ArgumentTypeError(f"{text!r}; expected one of {', '.join(_OPTIONAL_PRECISIONS)}")
    return text


@dataclass(frozen=True)
class Choices:
    """The choices of an artifact's content.

    opset: the version of the ONNX operators, see ``to_onnx``. batches: the batch sizes for TensorRT and Triton. engine:
    True to build a TensorRT engine too. without: precisions that are not written. decoder_weights: one of
    DECODER_WEIGHTS.
    """

    opset: int = OPSET
    batches: BatchProfile = BATCHES
    engine: bool = False
    without: tuple[str, ...] = ()
    decoder_weights: str = DECODER_WEIGHTS[0]


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export. Raises ValueError for a wrong value.

    batches: the usual and the largest batch size, as in ``--batches``.
    """

    name: str | None = option(None, "the model's name", parse=parse_name, metavar="NAME", shown="capsnet-DATASET")
    model_version: str | None = option(
        None, "the version of the artifact", parse=parse_version, metavar="N", shown="one more than the highest there"
    )
    data_dir: Path | None = option(
        None, DATA_DIR_HELP, parse=parse_folder, metavar="FOLDER", shown="the cache, then a download"
    )
    source: tuple[str, ...] = option((), SOURCE_HELP, parse=parse_managers, metavar="NAMES", shown="none is asked")
    data: Path | None = option(
        None, "the folder of images that it was trained on", parse=parse_folder, metavar="FOLDER", shown=""
    )
    without: tuple[str, ...] = option(
        (), "precisions to leave out: int8, fp16", parse=parse_precision, count="+", metavar="PRECISION", shown="none"
    )
    decoder_weights: str = option(
        "fp32",
        "how decoder.onnx stores its weights: fp32, or int8, a quarter of the size; it computes in fp32 with both",
        choices=DECODER_WEIGHTS,
    )
    tensorrt: bool = option(False, "also build a TensorRT engine, for the GPU of this machine", shown="")
    batches: tuple[int, int] = option(
        (BATCHES.opt, BATCHES.max),
        "what TensorRT and Triton are to expect: batches of up to MAX images, fastest at OPT",
        parse=int,
        count=2,
        metavar=("OPT", "MAX"),
        shown=f"{BATCHES.opt} {BATCHES.max}",
    )
    opset: int = option(
        OPSET,
        "version of the ONNX operators",
        minimum=OPSETS[0],
        maximum=OPSETS[-1],
        metavar=f"{OPSETS[0]}-{OPSETS[-1]}",
    )

    def __post_init__(self) -> None:
        check(self)
        check_places(self.data, self.data_dir, self.source)
        try:
            _ = self.profile
        except ValueError as error:
            raise ValueError(f"batches: {error}") from error

    @property
    def chosen(self) -> Choices:
        """Return the choices of the artifact's content."""
        return Choices(self.opset, self.profile, self.tensorrt, self.without, self.decoder_weights)

    @property
    def profile(self) -> BatchProfile:
        """Return the batch sizes for TensorRT."""
        return BatchProfile(1, *self.batches)
