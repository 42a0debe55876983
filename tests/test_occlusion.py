"""Tests of relevance by occlusion, without a network."""

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.files.occlusion import Occlusion, drops_of, ground_of


def poses_of(images: NDArray[np.uint8], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the poses (B, 2, 3) of a linear network."""
    poses: NDArray[np.float32] = (images.reshape(len(images), -1) @ weight).reshape(-1, 2, 3).astype(np.float32)
    return poses


@pytest.mark.parametrize("size", [(28, 28), (36, 36), (5, 40), (1, 1), (224, 224)], ids=str)
def test_about_two_hundred_patches_cover_every_pixel(size: tuple[int, int]) -> None:
    occlusion = Occlusion(*size)
    bright = np.full((1, *size), 9, np.uint8)
    images, places = occlusion.masked(bright, np.zeros(1, np.uint8))
    assert len(images) == occlusion.max_images == len(places) + 1 <= 200
    np.testing.assert_array_equal(images[0], bright)
    assert (images[1:] == 0).any(0).all()
    assert all((image == 0).any() for image in images[1:])
    if size[0] >= 28:
        assert occlusion.max_images == 197


def test_patches_of_ground_are_not_computed() -> None:
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, 14, 14] = 200
    images, _ = Occlusion(28, 28).masked(image, np.zeros(1, np.uint8))
    assert 1 < len(images) < 10
    assert (images[1:] == 0).all()
    blank, none = Occlusion(28, 28).masked(np.zeros_like(image), np.zeros(1, np.uint8))
    assert (len(blank), none) == (1, [])


def test_relevance_is_the_mean_drop_of_the_patches_over_a_pixel() -> None:
    generator = np.random.default_rng(0)
    image = generator.integers(1, 256, (1, 10, 12), np.uint8)
    weight = generator.normal(size=(120, 6)).astype(np.float32)
    occlusion = Occlusion(10, 12)
    images, places = occlusion.masked(image, np.zeros(1, np.uint8))
    poses = poses_of(images, weight)
    maps = occlusion.relevance(poses, places, [1, 0])
    assert maps.shape == (2, 10, 12)
    for place, index in enumerate([1, 0]):
        direction = poses[0, index] / np.linalg.norm(poses[0, index])
        drops = [poses[0, index] @ direction - one @ direction for one in poses[1:, index]]
        hidden = images[1:, 0] == 0
        expected = (np.array(drops)[:, None, None] * hidden).sum(0) / hidden.sum(0)
        np.testing.assert_allclose(maps[place], expected, rtol=1e-3, atol=1e-2)


def test_a_pose_that_turns_to_its_negative_has_dropped_by_twice_its_length() -> None:
    poses = np.array([[[3.0, 4.0]], [[-3.0, -4.0]], [[0.0, 0.0]], [[-4.0, 3.0]]], np.float32)
    np.testing.assert_allclose(drops_of(poses, [0])[:, 0], [10, 5, 5])
    np.testing.assert_array_equal(drops_of(np.zeros((3, 1, 2), np.float32), [0]), 0)


def test_the_ground_is_that_of_the_polarity_or_else_the_most_common_value_of_the_border() -> None:
    image = np.full((3, 6, 6), 77, np.uint8)
    image[1] = 88
    image[:, 1:-1, 1:-1] = 5
    image[:, 0, 0] = 1
    assert ground_of(image, "").tolist() == [77, 88, 77]
    assert ground_of(image, "bright-on-dark").tolist() == [0, 0, 0]
    assert ground_of(image, "dark-on-bright").tolist() == [255, 255, 255]
