"""Tests of the pictures that the command-line client draws in terminals and as PNG files."""

import io
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from serving.client.drawing import RAMP, Drawing, Terminal, overlay, picture_of, strip, to_png

PLAIN, COLOURED = Terminal(colours=False, columns=80), Terminal(colours=True, columns=80)


class _Stream(io.StringIO):
    def __init__(self, terminal: bool, encoding: str = "utf-8") -> None:
        super().__init__()
        self._terminal = terminal
        self._encoding = encoding

    def isatty(self) -> bool:
        return self._terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


@pytest.mark.parametrize(
    ("terminal", "encoding", "environment", "colours"),
    [
        (True, "utf-8", {"COLORTERM": "truecolor"}, True),
        (True, "UTF-8", {"COLORTERM": "24bit", "NO_COLOR": ""}, True),
        (True, "utf-8", {"COLORTERM": "truecolor", "NO_COLOR": "1"}, False),
        (True, "utf-8", {}, False),
        (True, "utf-8", {"COLORTERM": "yes"}, False),
        (True, "ascii", {"COLORTERM": "truecolor"}, False),
        (False, "utf-8", {"COLORTERM": "truecolor"}, False),
    ],
)
def test_colours_go_to_terminals_that_have_them_and_to_nobody_who_declines(
    terminal: bool, encoding: str, environment: dict[str, str], colours: bool
) -> None:
    assert Terminal.of(_Stream(terminal, encoding), environment).colours is colours


def _image(*rows: Sequence[int]) -> NDArray[np.uint8]:
    return np.array([rows], np.uint8)


def test_a_terminal_without_colours_shows_two_rows_as_one_character() -> None:
    image = _image([0, 255, 128], [0, 255, 128], [0, 255, 0])
    caption, first, second = PLAIN.lines([Drawing("x", picture_of(image))])
    assert caption == "x"
    assert first == f" @{RAMP[5]}"
    assert second == " @"


def test_a_relevance_map_without_colours_tells_positive_from_negative_numbers() -> None:
    numbers = np.array([[1, -1, 0, 0.5]] * 2, np.float32)
    picture = overlay(np.zeros((1, 2, 4), np.uint8), numbers)
    assert (
        PLAIN.lines([Drawing("x", picture, numbers)])[1] == "@- *"
        or PLAIN.lines([Drawing("x", picture, numbers)])[1] == "@- +"
    )


def test_half_blocks_carry_the_colours_of_two_pixels() -> None:
    picture = np.array([[[1, 2, 3], [1, 2, 3]], [[4, 5, 6], [4, 5, 6]]], np.uint8)
    assert COLOURED.lines([Drawing("x", picture)])[1] == "\x1b[38;2;1;2;3;48;2;4;5;6m▀▀\x1b[0m"


@pytest.mark.parametrize("terminal", [PLAIN, COLOURED], ids=["plain", "coloured"])
def test_drawings_stand_side_by_side_until_the_width_is_full(terminal: Terminal) -> None:
    drawings = [Drawing(f"number {index}", picture_of(np.full((1, 28, 28), 200, np.uint8))) for index in range(3)]
    lines = terminal.lines(drawings)
    assert len(lines) == 2 * (1 + 14)
    assert lines[0].split() == ["number", "0", "number", "1"]
    assert lines[0].index("number 1") == 30
    assert lines[15] == "number 2"


@pytest.mark.parametrize("terminal", [PLAIN, COLOURED], ids=["plain", "coloured"])
def test_a_picture_that_is_wider_than_the_terminal_is_shrunk(terminal: Terminal) -> None:
    numbers = np.ones((50, 200), np.float32)
    drawing = Drawing("x" * 200, np.full((50, 200, 3), 255, np.uint8), numbers)
    lines = terminal.lines([drawing])
    assert len(lines) == 1 + 10
    assert lines[0] == "x" * 80
    assert max(line.count("▀") or len(line) for line in lines) == 80


def test_no_drawings_are_no_lines() -> None:
    assert PLAIN.lines([]) == []


def test_an_overlay_is_orange_where_relevance_is_positive_and_blue_where_it_is_negative() -> None:
    picture = overlay(_image([255, 255, 0, 0]), np.array([[0, 1, -1, 0]], np.float32)).astype(int)
    grey, positive, negative, ground = picture[0]
    assert grey[0] == grey[1] == grey[2] > 100
    assert positive[0] > positive[1] > positive[2]
    assert negative[2] > negative[1] > negative[0]
    assert ground.tolist() == [0, 0, 0]
    assert overlay(_image([255]), np.zeros((1, 1), np.float32)).max() < 255


def test_png_files_have_the_pixels_and_the_scale() -> None:
    image = _image([0, 50], [100, 200])
    with Image.open(io.BytesIO(to_png(image))) as plain:
        assert (plain.format, plain.mode) == ("PNG", "L")
        assert np.asarray(plain).tolist() == image[0].tolist()
    with Image.open(io.BytesIO(to_png(picture_of(image), 3))) as large:
        assert (large.size, large.mode) == ((6, 6), "RGB")
        assert np.asarray(large)[::3, ::3, 0].tolist() == image[0].tolist()


def test_colours_stay_in_a_picture_and_other_channels_become_grey() -> None:
    colours = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    assert picture_of(colours)[1, 0].tolist() == [2, 6, 10]
    assert picture_of(np.stack([colours[0]] * 4)).tolist() == np.stack([colours[0]] * 3, -1).tolist()


def test_a_strip_shows_pictures_side_by_side() -> None:
    pictures = [np.full((2, 3, 3), level, np.uint8) for level in (10, 20)]
    row = strip(pictures)[0, :, 0].tolist()
    assert (row[:3], row[-3:], len(row)) == ([10] * 3, [20] * 3, 8)
