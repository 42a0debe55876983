"""Photographs of MNIST's digits on paper."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter


def photograph(digit: NDArray[np.uint8], rng: np.random.Generator, scale: float) -> Image.Image:
    """Return a digit, (28, 28) bright on black, as a photograph of dark ink on a larger sheet of paper.

    scale: the pixels of one of the digit's. The digit is turned a little, out of focus, and anywhere on the sheet. The
    light fades over the sheet, and a third of the photographs have a shadow with a sharp edge.
    """
    side = int(28 * scale)
    large = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    turned = large.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC)
    ink = turned.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.02) * side))
    height, width = (int(side * factor) for factor in rng.uniform(1.0, 2.2, 2))
    sheet = np.zeros((height, width), np.float32)
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    sheet[top : top + side, left : left + side] = np.asarray(ink, np.float32) / 255
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 - rng.uniform(0, 0.35) * (np.cos(angle) * x + np.sin(angle) * y + 1) / 2
    if rng.random() < 1 / 3:
        edge = np.cos(angle) * y - np.sin(angle) * x > rng.uniform(-0.6, 0.6)
        light *= np.where(edge, 1, rng.uniform(0.6, 1))
    grey = rng.uniform(150, 250) * light * (1 - rng.uniform(0.5, 0.95) * sheet)
    grey += rng.normal(0, rng.uniform(0, 10), (height, width))
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
