"""Tests of the random changes to training images."""

from collections import Counter
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from training.data.augment import AUGMENTATIONS, Augmentation, affine, all_shifts, distort, erase, none, shift

HEIGHT, WIDTH = 20, 30  # different, so that a swap of the axes fails
SHIFTS = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
TURNS = torch.arange(5)  # random augmentations ignore it
RANDOM = pytest.mark.parametrize("name", ["shift", "affine"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, HEIGHT, WIDTH, generator=generator(seed))


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """Return the image moved by whole pixels, with zeros moving in."""
    top, left = 2 - down, 2 - right
    return pad(image, (2, 2, 2, 2))[..., top : top + HEIGHT, left : left + WIDTH]


def applied_shifts(image: Tensor, results: Tensor) -> list[tuple[int, int]]:
    """Return the shift, by up to two pixels, of each result (B, C, H, W) of the image (C, H, W)."""
    candidates = torch.stack([shifted(image, *by) for by in SHIFTS])
    errors = (results[:, None] - candidates).abs().flatten(2).amax(2)
    assert errors.amin(1).max() < 1e-5
    return [SHIFTS[best] for best in errors.argmin(1).tolist()]


def centres(images: Tensor) -> Tensor:
    """Return the centre of mass of each image's first channel, (B, 2), in pixels down and right."""
    weights = images[:, 0] / images[:, 0].sum((1, 2), keepdim=True)
    down = (weights * torch.arange(images.shape[2])[:, None]).sum((1, 2))
    right = (weights * torch.arange(images.shape[3])).sum((1, 2))
    return torch.stack([down, right], 1)


def test_a_shift_moves_an_image_by_whole_pixels_and_loses_only_what_leaves_the_frame() -> None:
    images = random_images(30, channels=3) + 0.1  # no black pixels, so every black pixel in the results has moved in

    results = shift(images, TURNS, generator(1))

    assert results.shape == images.shape
    for image, result in zip(images, results, strict=True):
        ((down, right),) = applied_shifts(image, result[None])
        assert (result < 0.05).sum() == 3 * (HEIGHT * WIDTH - (HEIGHT - abs(down)) * (WIDTH - abs(right)))


def test_every_shift_of_up_to_two_pixels_is_as_likely_as_another() -> None:
    image = random_images(1)
    counts = Counter(applied_shifts(image[0], shift(image.repeat(1000, 1, 1, 1), TURNS, generator(2))))
    assert set(counts) == set(SHIFTS)
    assert min(counts.values()) > 20
    assert max(counts.values()) < 60


def test_all_shifts_shows_an_image_in_every_shift_once_in_25_turns_and_begins_differently_for_each() -> None:
    image = random_images(1, channels=3)[0]
    turns = torch.arange(7, 32)

    found = applied_shifts(image, all_shifts(image.repeat(25, 1, 1, 1), turns, generator()))

    assert sorted(found) == SHIFTS
    again = applied_shifts(image, all_shifts(image.repeat(25, 1, 1, 1), turns + 25, generator(1)))
    assert again == found


def test_an_affine_change_keeps_shape_and_range_and_lets_black_in() -> None:
    images = torch.ones(200, 1, HEIGHT, WIDTH)

    results = affine(images, TURNS, generator())

    assert results.shape == images.shape
    assert results.dtype == images.dtype
    assert results.min() == 0
    assert 0.999 < results.max() <= 1 + 1e-5
    assert results.mean() > 0.8


def test_an_affine_change_moves_the_centre_by_little_and_on_average_not_at_all() -> None:
    size = 29
    images = torch.zeros(1000, 1, size, size)
    images[:, 0, 13:16, 13:16] = 1

    moves = centres(affine(images, TURNS, generator())) - 14

    assert moves.abs().max() < 3.2  # two pixels, stretched by scale and shear
    assert moves.abs().amax(0).min() > 1.5
    assert moves.mean(0).abs().max() < 0.15


def test_an_affine_change_stays_within_its_limits() -> None:
    size = 41
    images = torch.zeros(1000, 1, size, size)
    images[:, 0, 19:22, 5:36] = 1  # a horizontal bar

    results = affine(images, TURNS, generator())

    down = torch.arange(size)[:, None] - centres(results)[:, 0, None, None]
    right = torch.arange(size) - centres(results)[:, 1, None, None]
    weights = results[:, 0] / results[:, 0].sum((1, 2), keepdim=True)
    across, spread = (weights * down * right).sum((1, 2)), (weights * right * right).sum((1, 2))
    tilts = torch.rad2deg(torch.atan(across / spread))
    stretches = (spread / images[0, 0, 20].nonzero().double().var()).sqrt()
    assert 10 < tilts.max() < 25
    assert -25 < tilts.min() < -10
    assert 1.05 < stretches.max() < 1.25
    assert 0.75 < stretches.min() < 0.95


@RANDOM
def test_images_of_one_batch_are_changed_differently_and_seldom_left_alone(name: str) -> None:
    images = random_images(1).repeat(50, 1, 1, 1)

    results = AUGMENTATIONS[name](images, TURNS, generator())

    assert len({result.numpy().tobytes() for result in results}) > 15
    unchanged = sum(torch.allclose(image, result, atol=1e-3) for image, result in zip(images, results, strict=True))
    assert unchanged < 10


@RANDOM
def test_the_channels_of_an_image_move_together(name: str) -> None:
    images = random_images(10).repeat(1, 3, 1, 1)
    results = AUGMENTATIONS[name](images, TURNS, generator())
    torch.testing.assert_close(results, results[:, :1].expand(-1, 3, -1, -1))


@RANDOM
def test_the_generator_alone_decides_the_changes(name: str) -> None:
    images = random_images(10)
    augment = AUGMENTATIONS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = augment(images, TURNS, generator(5))
        torch.manual_seed(2)
        before = torch.get_rng_state()
        again = augment(images, TURNS, generator(5))
        assert torch.get_rng_state().equal(before)

    assert first.equal(again)
    assert not first.equal(augment(images, TURNS, generator(6)))


@RANDOM
def test_successive_draws_from_one_generator_differ(name: str) -> None:
    images, source = random_images(10), generator()
    assert not AUGMENTATIONS[name](images, TURNS, source).equal(AUGMENTATIONS[name](images, TURNS, source))


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_the_images_given_are_left_as_they_were(name: str) -> None:
    images = random_images(5)
    AUGMENTATIONS[name](images, TURNS, generator())
    assert images.equal(random_images(5))


def test_none_changes_nothing() -> None:
    images = random_images(3)
    assert none(images, TURNS, generator()).equal(images)


def test_the_augmentations_go_by_their_names() -> None:
    assert {"affine": affine, "shift": shift, "all-shifts": all_shifts, "none": none} == AUGMENTATIONS


@pytest.mark.parametrize("size", [28, 140])
def test_the_furthest_affine_shift_is_a_share_of_the_image(size: int) -> None:
    images = torch.zeros(500, 1, size, size)
    images[:, 0, size // 2 - 1 : size // 2 + 1, size // 2 - 1 : size // 2 + 1] = 1
    moves = centres(Augmentation("affine", shift_share=0.1)(images, TURNS, generator())) - (size - 1) / 2
    assert 0.08 * size < moves.abs().max() < 0.14 * size


@pytest.mark.parametrize("name", ["none", "shift", "all-shifts", "affine"])
def test_an_elastic_deformation_moves_the_parts_of_an_image_differently_and_weakly(name: str) -> None:
    ramps = torch.stack([torch.arange(29.0).expand(29, 29), torch.arange(29.0)[:, None].expand(29, 29)])
    images = ramps.expand(200, 2, 29, 29) / 29
    turns = torch.full((200,), 12)  # the shift by nothing
    elastic = Augmentation(name, elastic=0.4)(images, turns, generator(1))
    if name == "affine":  # which draws its matrices first
        plain = AUGMENTATIONS[name](images, turns, generator(1))
    elif name == "shift":
        plain = shift(images, turns, generator(1))
    else:
        plain = images
    moved = 29 * (elastic - plain)[:, :, 8:21, 8:21]  # in pixels, within the image
    assert 0.2 < moved.std() < 0.5
    assert moved.flatten(2).std(2).mean() > 0.1
    assert (moved[..., 1:] - moved[..., :-1]).abs().max() < 1


def test_everything_that_moves_pixels_is_one_interpolation(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Mock(side_effect=torch.nn.functional.grid_sample)
    monkeypatch.setattr(torch.nn.functional, "grid_sample", sample)
    Augmentation("affine", elastic=0.4, erasing=0.5)(random_images(4), TURNS, generator())
    distort(random_images(4), generator(), elastic=0.4)
    assert sample.call_count == 2


def test_flip_mirrors_its_share_of_the_images_left_to_right() -> None:
    images = random_images(1000)
    results = Augmentation("none", flip=0.25)(images, torch.zeros(1000, dtype=torch.int64), generator())
    mirrored = results.eq(images.flip(3)).flatten(1).all(1)
    assert results.eq(images).flatten(1).all(1).eq(~mirrored).all()
    assert 200 < mirrored.sum() < 300


def test_erasing_makes_a_square_of_four_by_four_pixels_black_in_its_share_of_the_images() -> None:
    images = torch.ones(1000, 3, HEIGHT, WIDTH)
    results = erase(images, 0.25, generator())
    erased = (results == 0).all(1)
    counts = erased.flatten(1).sum(1)
    assert set(counts.tolist()) == {0, 16}
    assert 200 < (counts == 16).sum() < 300
    squares = erased[counts == 16]
    assert (squares.any(1).sum(1) == 4).all()
    assert (squares.any(2).sum(1) == 4).all()
    assert squares.any(0).float().mean() > 0.95
    assert erase(torch.ones(2, 1, 2, 3), 1, generator()).eq(0).all()
