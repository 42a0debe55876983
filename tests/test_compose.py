"""Tests of images composed of digits: their places, their pairs, and the content of the test sets."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import Digits
from training.data import datasets, specs
from training.data.compose import affnist_spec, combine, members, place, scenes
from training.data.datasets import Dataset, per_class


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def solid(count: int, height: int = 3, width: int = 4) -> Tensor:
    """Return images (N, 2, H, W) without a black pixel, each pixel and channel with another value."""
    pixels = count * 2 * height * width
    return (1 + torch.arange(pixels) % 254).to(torch.uint8).reshape(count, 2, height, width)


def corners(images: Tensor) -> list[tuple[int, int]]:
    """Return the first row and column of each image (N, C, S, S) that are not black."""
    found = []
    for ink in images.amax(1) > 0:
        rows, columns = ink.any(1).nonzero(), ink.any(0).nonzero()
        found.append((int(rows[0]), int(columns[0])))
    return found


def test_an_object_is_placed_whole_and_unchanged_with_black_around_it() -> None:
    objects = solid(40)

    placed = place(objects, 7, generator())

    assert placed.shape == (40, 2, 7, 7)
    assert placed.dtype == torch.uint8
    for original, image, (top, left) in zip(objects, placed, corners(placed), strict=True):
        assert image[:, top : top + 3, left : left + 4].equal(original)
        assert image.count_nonzero() == original.numel()


def test_every_place_on_the_canvas_is_as_likely_as_another() -> None:
    counts = Counter(corners(place(solid(1).expand(2000, -1, -1, -1), 7, generator())))
    assert set(counts) == {(top, left) for top in range(5) for left in range(4)}
    assert min(counts.values()) > 60
    assert max(counts.values()) < 140


def test_a_digit_on_36x36_is_shifted_by_up_to_four_pixels_each_way() -> None:
    places = corners(place(solid(1, 28, 28).expand(500, -1, -1, -1), 36, generator()))
    middle = [(top - 4, left - 4) for top, left in places]
    assert {top for top, _ in middle} == {left for _, left in middle} == set(range(-4, 5))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_overlapping_objects_are_added_and_clipped_at_white(dtype: torch.dtype) -> None:
    scale = 1 if dtype == torch.uint8 else 255
    parts = torch.tensor([[[[[200, 100, 0]]], [[[100, 100, 7]]]]]).to(dtype) / scale
    combined = combine(parts.to(dtype))
    assert combined.dtype == dtype
    torch.testing.assert_close(combined, (torch.tensor([[[[255, 200, 7]]]]) / scale).to(dtype))


def test_partners_are_of_another_class_and_any_image_of_it_can_be_one() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    drawn: Counter[int] = Counter()
    for seed in range(600):
        chosen = members(labels, 2, generator(seed))
        assert chosen[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
        assert (labels[chosen[:, 0]] != labels[chosen[:, 1]]).all()
        drawn[int(chosen[0, 1])] += 1
    assert set(drawn) == {3, 4, 5}
    assert max(drawn.values()) - min(drawn.values()) < 100


def test_an_image_of_one_object_has_no_partner() -> None:
    assert members(torch.tensor([3, 3, 3]), 1, generator()).tolist() == [[0], [1], [2]]


def test_pairs_of_a_single_class_are_refused() -> None:
    with pytest.raises(ValueError, match="two classes at least"):
        members(torch.tensor([3, 3, 3]), 2, generator())


def test_scenes_hold_the_objects_that_their_labels_name() -> None:
    objects, labels = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 2])
    objects[labels] = torch.tensor([10, 50, 90], dtype=torch.uint8).reshape(3, 1, 1, 1)

    images, classes = scenes(objects, labels, 2, 40, generator(4))

    assert images.shape == (3, 1, 40, 40)
    for image, pair in zip(images, classes, strict=True):
        values = sorted(image.unique().tolist())
        assert set(values) - {60, 100, 140} == {0, *(10 + 40 * label for label in pair.tolist())}


def disks(count: int) -> Tensor:
    rows, columns = torch.arange(28)[:, None] - 13.5, torch.arange(28) - 13.5
    disk = (rows**2 + columns**2 < 81) * 200
    return disk.to(torch.uint8).expand(count, 1, -1, -1)


def test_distorted_digits_lose_nothing_and_lie_anywhere() -> None:
    images = affnist_spec(disks(1000), 40, generator())
    assert images.shape == (1000, 1, 40, 40)
    area = (images > 100).sum((1, 2, 3)) / (disks(1) > 100).sum()
    assert 0.6 < area.min() < 0.75
    assert 1.3 < area.max() < 1.5
    tops, lefts = zip(*corners(images), strict=True)
    assert min(tops) == min(lefts) == 0
    flipped = corners(images.flip(2, 3))
    assert min(top for top, _ in flipped) == min(left for _, left in flipped) == 0


def test_a_blank_digit_stays_blank() -> None:
    assert not affnist_spec(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), 40, generator()).any()


@pytest.fixture
def mnist(monkeypatch: pytest.MonkeyPatch, digits: Digits) -> Dataset:
    """Replace MNIST's training digits by a few of its test digits."""
    images, labels = torch.from_numpy(digits.images).unsqueeze(1), torch.from_numpy(digits.labels).long()
    dataset = Dataset("mnist", tuple("0123456789"), images[:50], labels[:50], images[50:350], labels[50:350])
    load = datasets.load
    monkeypatch.setattr(datasets, "load", lambda name, *rest, **more: dataset if name == "mnist" else load(name))
    return dataset


def test_multimnist_trains_on_mnists_digits_and_tests_on_pairs_of_its_test_digits(mnist: Dataset) -> None:
    dataset = datasets.load("multimnist")
    assert (dataset.objects, dataset.canvas, dataset.image_shape) == (2, 36, (1, 36, 36))
    assert dataset.train_images is mnist.train_images
    assert dataset.test_images.shape == (3000, 1, 36, 36)
    assert dataset.test_labels[:, 0].equal(mnist.test_labels.repeat(10))
    assert (dataset.test_labels[:, 0] != dataset.test_labels[:, 1]).all()
    again = datasets.load("multimnist")
    assert again.test_images.equal(dataset.test_images)


def test_the_first_pairs_of_multimnist_are_one_round_and_the_others_are_further_rounds(mnist: Dataset) -> None:
    dataset = datasets.load("multimnist")
    drawn = generator()
    for part, labels in zip(torch.split(dataset.test_images, 300), torch.split(dataset.test_labels, 300), strict=True):
        images, expected = scenes(mnist.test_images, mnist.test_labels, 2, 36, drawn)
        assert part.equal(images)
        assert labels.equal(expected)
    assert len({image.numpy().tobytes() for image in dataset.test_images}) == 3000


def test_affnist_spec_trains_on_plain_digits_and_tests_on_distorted_ones(mnist: Dataset) -> None:
    dataset = datasets.load("affnist-spec")
    assert (dataset.objects, dataset.canvas, dataset.image_shape) == (1, 40, (1, 40, 40))
    assert dataset.train_images is mnist.train_images
    assert dataset.test_images.shape == (300, 1, 40, 40)
    assert dataset.test_labels is mnist.test_labels
    brightness = dataset.test_images.sum((1, 2, 3)) / mnist.test_images.sum((1, 2, 3))
    assert 0.5 < brightness.min() < 0.9
    assert 1.1 < brightness.max() < 1.6
    assert datasets.load("affnist-spec").test_images.equal(dataset.test_images)


def test_a_choice_of_each_class_has_so_many_of_each_and_grows_with_the_number(mnist: Dataset) -> None:
    labels = mnist.test_labels
    few, more = per_class(labels, 3, seed=1), per_class(labels, 5, seed=1)
    assert Counter(labels[few].tolist()) == dict.fromkeys(range(10), 3)
    assert Counter(labels[more].tolist()) == dict.fromkeys(range(10), 5)
    assert set(few.tolist()) < set(more.tolist())
    assert few.equal(few.sort().values)
    assert not few.equal(per_class(labels, 3, seed=2))


def test_more_of_a_class_than_there_are_is_refused(mnist: Dataset) -> None:
    with pytest.raises(ValueError, match="per_class: 300; class 0 has 25 images to train on"):
        per_class(mnist.test_labels, 300, seed=1)


def test_the_generated_sets_are_known_by_name(tmp_path: Path) -> None:
    assert {"multimnist", "affnist-spec", "mnist", "fashion-mnist", "cifar10", "svhn", "smallnorb"} == set(specs.NAMES)
