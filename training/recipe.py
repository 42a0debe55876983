"""The options of a run, one field for each: its flag, default, choices, help and check.

This module does not import PyTorch, which takes seconds, so that a wrong choice is refused at once.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from serving.files.options import check, option
from training.data.sources import DATA_DIR_HELP, SOURCE_HELP, check_places, parse_folder, parse_managers
from training.data.specs import NAMES
from training.tracking import TRACKERS

CONFIG_NAMES = ("paper", "authors", "compact", "fast", "accurate", "wide", "pairs")
OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("cosine", "exponential")
AUGMENTATION_NAMES = ("affine", "shift", "all-shifts", "none")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
INITIALIZATIONS = ("pytorch", "authors")
AGREEMENTS = ("scalar-product", "euclidean")
NORMALIZATIONS = ("softmax", "max-min")

DEFAULT_DATASET = "mnist"
SHIFT_SHARE = 2 / 28  # of the image's height and width
HELD_OUT_SHARE = 12  # MNIST's 60,000 training images hold out 5,000
# Of the sum of squared pixel errors, against the margin loss: 0.392 times the mean of MNIST's 784 pixels. The authors'
# code averages the margin loss over the classes and halves it, which makes it 0.01, 7.84 times the mean.
PIXEL_WEIGHT = 0.0005


def parse_widths(text: str) -> tuple[int, ...]:
    """Return the layers that ``512,1024`` or ``none`` names."""
    try:
        return () if text == "none" else tuple(int(width) for width in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}; expected whole numbers, as 512,1024, or none") from error


def parse_stem(text: str) -> tuple[tuple[int, ...], ...]:
    """Return the convolutions (channels, kernel, stride, padding) that ``32x5x2x2,64x3x1x1`` or ``none`` names."""
    try:
        return () if text == "none" else tuple(tuple(map(int, layer.split("x"))) for layer in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected channels, kernel, stride and padding, as 32x5x2x2,64x3x1x1, or none"
        ) from error


@dataclass(frozen=True)
class Recipe:
    """The choices of a training. Every field is a flag of ``python -m training``. Raises ValueError on a wrong one.

    steps: None for the steps of the epochs. augment: None for the data set's default: ``none`` if images are composed
    of objects at random places, as in the papers, else ``affine``. precision: None for the device's fastest.
    per_class: None for all images. held_out: None for one in HELD_OUT_SHARE.
    """

    epochs: int = option(40, "epochs, each a pass over the training images or --min-epoch-steps", minimum=1)
    min_epoch_steps: int = option(
        25,
        "least steps of an epoch, which passes several times over few images",
        minimum=0,
    )
    steps: int | None = option(
        None,
        "steps of the whole run, in --epochs equal parts",
        parse=int,
        minimum=1,
        shown="those of the epochs",
    )
    batch_size: int = option(128, "images a step, of all processes together", minimum=1)
    optimizer: str = option("adam", "adam, or adamw with --weight-decay", choices=OPTIMIZERS)
    weight_decay: float = option(
        0.01, "decay of matrices and kernels by adamw, not of biases and normalizations", minimum=0
    )
    learning_rate: float = option(2e-3, "peak of the learning rate, to which a linear warm-up leads", above=0)
    schedule: str = option(
        "cosine",
        "of the learning rate after the warm-up: half a cosine down to 0; or exponential, the authors' "
        "0.96^(step/2000) down to 1e-6",
        choices=SCHEDULES,
    )
    warmup_epochs: float = option(1.0, "length of the warm-up", minimum=0)
    ema_decay: float = option(
        0.999,
        "decay a step of the averaged weights, the ones that are evaluated and kept; at most (1+n)/(10+n) in step n",
        minimum=0,
        below=1,
    )
    augment: str | None = option(
        None,
        "random changes to the training images: affine; shift by up to two pixels, the paper's; all-shifts, the 25 of "
        "them in turn, the authors'; or none",
        choices=AUGMENTATION_NAMES,
        shown="affine, or none where the data set composes its images",
    )
    shift_share: float = option(
        SHIFT_SHARE,
        "furthest shift of affine, as a share of the image's height and width; 2 pixels of 28",
        minimum=0,
        below=1,
        shown="1/14",
    )
    flip: float = option(
        0.0,
        "share of the images that are mirrored left to right, as 0.5 for clothes or animals, not for digits or writing",
        minimum=0,
        maximum=1,
    )
    elastic: float = option(
        0.0,
        "standard deviation of an elastic deformation, in pixels, as 0.4; in one interpolation with the other changes",
        minimum=0,
    )
    erasing: float = option(
        0.0, "share of the images in which a square of 4x4 pixels becomes black", minimum=0, maximum=1
    )
    pixel_weight: float = option(
        PIXEL_WEIGHT,
        "weight of the sum of squared pixel errors in the loss; the authors' code amounts to 0.01",
        minimum=0,
    )
    gradient_clip: float = option(
        0.0, "largest norm of the gradient; a larger one is scaled down to it; 0 scales none", minimum=0
    )
    precision: str | None = option(
        None,
        "32-true, or mixed: bf16-mixed, or 16-mixed on a GPU",
        choices=PRECISIONS,
        shown="bf16-mixed where the GPU or the processor computes it fast, else 32-true",
    )
    compile: bool = option(False, "compile the network with PyTorch's compiler, which needs a C++ compiler")
    none: float = option(
        0.0,
        "share of a step's images that show none of the classes, as 0.125 for one in eight: constants, noise, shuffled "
        "patches, blobs; no capsule is to be long",
        minimum=0,
        maximum=0.5,
    )
    distil: tuple[str, ...] = option(
        (),
        "checkpoints (capsnet.pt or .safetensors) of networks for the same classes; the means of their lengths are "
        "learned too",
        parse=str,
        count="+",
        metavar="CHECKPOINT",
        shown="none",
    )
    distil_weight: float = option(1.0, "weight of the squared differences to these means in the loss", minimum=0)
    vote_blocks: int = option(
        1,
        "blocks of primary capsules that are routed one after the other, without storing the votes: less memory, more "
        "time, the same result",
        minimum=1,
    )
    per_class: int | None = option(
        None,
        "images of each class to learn from, chosen at random; those held out are others",
        parse=int,
        minimum=1,
        shown="all",
    )
    held_out: int | None = option(
        None,
        "training images held out to select the epoch, 0 to train on all and keep the last epoch",
        parse=int,
        minimum=0,
        shown=f"one in {HELD_OUT_SHARE}",
    )
    seed: int = option(1, "seed of initialization, order, augmentation and split", minimum=0, maximum=2**31 - 1)
    deterministic: bool = option(
        False, "only operations that give the same result each time, or an error where PyTorch has none"
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class NetworkChanges:
    """The fields of ``CapsNetConfig`` that differ from --config. None: as in --config."""

    conv_channels: int | None = option(None, "channels of the first convolution", parse=int, minimum=1, shown="")
    primary_types: int | None = option(None, "types of primary capsules", parse=int, minimum=1, shown="")
    primary_dim: int | None = option(None, "dimension of the primary capsules", parse=int, minimum=1, shown="")
    digit_dim: int | None = option(None, "dimension of the digit capsules, the poses", parse=int, minimum=1, shown="")
    routing_iterations: int | None = option(
        None, "iterations of the routing; 1 is uniform coupling", parse=int, minimum=1, shown=""
    )
    decoder_widths: tuple[int, ...] | None = option(
        None,
        "layers of the decoder, as 512,1024, or none to train without reconstruction",
        parse=parse_widths,
        metavar="N,N",
        shown="",
    )
    digit_bias: bool | None = option(
        None, "a bias on each digit capsule's sum of votes (the authors' code)", parse=bool, shown=""
    )
    primary_divisor: float | None = option(
        None,
        "what the primary convolution's output is divided by before its bias is added (authors: 32)",
        parse=float,
        above=0,
        shown="",
    )
    initialization: str | None = option(None, "of the convolutions and the decoder", choices=INITIALIZATIONS, shown="")
    agreement: str | None = option(None, "of a vote with a pose", choices=AGREEMENTS, shown="")
    normalization: str | None = option(None, "of the routing logits to couplings", choices=NORMALIZATIONS, shown="")
    routing_gradient: bool | None = option(
        None, "let gradients flow through the couplings (the authors' code)", parse=bool, shown=""
    )
    routing_scale: float | None = option(
        None,
        "factor of the routing logits; above 1 the couplings go to fewer parents",
        parse=float,
        above=0,
        shown="",
    )
    primary_gate: bool | None = option(
        None, "a gate on each primary capsule, so that it can be absent", parse=bool, shown=""
    )
    stem: tuple[tuple[int, ...], ...] | None = option(
        None,
        "small convolutions with batch normalization in place of the first one, each as channels, kernel, stride and "
        "padding: 32x5x2x2,64x3x1x1, or none",
        parse=parse_stem,
        metavar="NxNxNxN,...",
        shown="",
    )
    primary_kernel: int | None = option(
        None, "kernel of the convolution that makes the primary capsules", parse=int, minimum=1, shown=""
    )
    primary_stride: int | None = option(None, "stride of that convolution", parse=int, minimum=1, shown="")

    def __post_init__(self) -> None:
        check(self)
        if any(len(layer) != 4 or min(layer[:3]) < 1 or layer[3] < 0 for layer in self.stem or ()):
            raise ValueError(f"stem: {self.stem}; expected channels, kernel and stride of 1 or more, and a padding")
        if self.decoder_widths and min(self.decoder_widths) < 1:
            raise ValueError(f"decoder_widths: {self.decoder_widths}; expected 1 or more each")


@dataclass(frozen=True)
class RunOptions:
    """The network, the data and the folder of a run. Raises ValueError if options contradict each other."""

    config: str = option("compact", "the network", choices=CONFIG_NAMES)
    dataset: str | None = option(None, "what it learns", choices=NAMES, shown=DEFAULT_DATASET)
    data: Path | None = option(
        None,
        "or a folder of your own images, FOLDER/CLASS/*.png, of any size",
        parse=parse_folder,
        metavar="FOLDER",
        shown="",
    )
    image_size: int | None = option(
        None,
        "with --data: height and width to scale all images to",
        parse=int,
        minimum=1,
        shown="their own if all have one, else 32",
    )
    data_dir: Path | None = option(
        None, DATA_DIR_HELP, parse=parse_folder, metavar="FOLDER", shown="the cache, then a download"
    )
    source: tuple[str, ...] = option((), SOURCE_HELP, parse=parse_managers, metavar="NAMES", shown="none is asked")
    track: str | None = option(
        None,
        "log the figures there too; the extra of the same name installs its package",
        choices=TRACKERS,
        shown="none",
    )
    out: Path | None = option(
        None, "the run's folder", parse=parse_folder, metavar="FOLDER", shown="runs/DATASET-CONFIG-SEED"
    )
    resume: bool = option(
        False, "continue the run in the run's folder, also a finished one with more --epochs", shown=""
    )

    def __post_init__(self) -> None:
        check(self)
        if self.data is not None and self.dataset is not None:
            raise ValueError("--data takes the place of --dataset; give one of them")
        check_places(self.data, self.data_dir, self.source)
        if self.image_size is not None and self.data is None:
            raise ValueError("--image-size goes with --data; the data sets have a size of their own")

    @property
    def data_name(self) -> str:
        """Return the name of the data set, or of the folder."""
        return self.data.resolve().name if self.data else self.dataset or DEFAULT_DATASET
