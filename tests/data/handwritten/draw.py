"""Draw the pictures of this folder again: ``python tests/data/handwritten/draw.py FOLDER``.

The strokes are written by hand, point for point, as a person's pen goes, each digit in two ways. A pen then wobbles and
presses along them on a sheet of paper under a lamp.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

ORIENTATION_TAG = 0x0112
#: Points (x, y) in hundredths of the digit's height, y downwards. A digit is a list of strokes.
STROKES = {
    "0a": [[(38, 3), (14, 18), (4, 50), (12, 85), (33, 98), (56, 84), (64, 50), (55, 17), (36, 2)]],
    "0b": [[(50, 6), (28, 10), (12, 35), (6, 68), (17, 93), (36, 95), (53, 72), (60, 40), (55, 15), (44, 3), (33, 7)]],
    "1a": [[(32, 0), (30, 50), (26, 100)]],
    "1b": [[(16, 22), (27, 12), (36, 0)], [(36, 0), (36, 50), (37, 100)]],
    "2a": [[(6, 22), (18, 5), (40, 2), (55, 16), (52, 38), (33, 64), (5, 96)], [(5, 96), (30, 93), (65, 97)]],
    "2b": [
        [
            (8, 20),
            (22, 3),
            (44, 6),
            (53, 25),
            (42, 52),
            (22, 80),
            (10, 93),
            (4, 88),
            (12, 80),
            (26, 86),
            (42, 97),
            (66, 90),
        ]
    ],
    "3a": [
        [(8, 12), (25, 1), (45, 6), (52, 22), (42, 40), (22, 47)],
        [(22, 47), (45, 50), (58, 68), (52, 88), (30, 100), (5, 92)],
    ],
    "3b": [
        [(6, 3), (30, 3), (55, 2)],
        [(55, 2), (40, 22), (25, 42)],
        [(25, 42), (47, 47), (57, 68), (47, 92), (24, 99), (3, 87)],
    ],
    "4a": [[(12, 2), (10, 30), (6, 55)], [(6, 55), (35, 56), (66, 53)], [(50, 10), (47, 50), (45, 100)]],
    "4b": [[(45, 0), (20, 35), (0, 68)], [(0, 68), (30, 69), (66, 67)], [(46, 0), (45, 50), (44, 100)]],
    "5a": [
        [(14, 3), (11, 25), (9, 44)],
        [(9, 44), (30, 37), (52, 48), (57, 70), (45, 92), (22, 100), (3, 90)],
        [(14, 3), (35, 4), (58, 1)],
    ],
    "5b": [
        [(60, 2), (40, 5), (20, 4)],
        [(20, 4), (17, 22), (12, 42)],
        [(12, 42), (34, 40), (50, 55), (50, 78), (34, 95), (10, 97)],
    ],
    "6a": [[(48, 0), (25, 20), (9, 50), (8, 80), (25, 99), (48, 92), (55, 72), (43, 55), (22, 58), (9, 75)]],
    "6b": [[(42, 2), (20, 25), (6, 60), (12, 88), (32, 98), (53, 86), (56, 68), (40, 56), (20, 66), (10, 82)]],
    "7a": [[(4, 5), (30, 4), (58, 2)], [(58, 2), (40, 40), (25, 100)]],
    "7b": [[(5, 10), (15, 3), (35, 7), (60, 3)], [(60, 3), (45, 45), (33, 100)], [(20, 50), (40, 48), (62, 47)]],
    "8a": [
        [
            (50, 14),
            (34, 1),
            (14, 10),
            (13, 30),
            (30, 45),
            (50, 62),
            (56, 84),
            (34, 100),
            (10, 88),
            (12, 64),
            (32, 46),
            (50, 30),
            (52, 14),
        ],
    ],
    "8b": [
        [(32, 0), (15, 10), (14, 32), (32, 44), (48, 32), (48, 10), (32, 0)],
        [(32, 44), (10, 56), (6, 82), (30, 100), (54, 84), (52, 58), (32, 44)],
    ],
    "9a": [[(52, 14), (35, 2), (13, 12), (10, 33), (27, 47), (46, 36), (53, 14)], [(53, 14), (52, 50), (48, 100)]],
    "9b": [
        [(50, 20), (34, 3), (12, 14), (8, 36), (25, 48), (44, 36), (50, 18)],
        [(50, 18), (52, 55), (45, 85), (28, 99), (10, 93)],
    ],
}


class Sheet(NamedTuple):
    """A sheet of paper and the pen on it.

    size: width and height in pixels. digit: its height in pixels. at: its upper left corner. pen: its width in pixels.
    slant: to the right for each pixel upwards. ink, paper: RGB. light: the share that the lamp's light loses over the
    sheet. noise: of the camera, in grey levels. ruled: the distance of faint lines, or 0. kind: of the file, by its
    ending. orientation: EXIF's number; the camera was turned. quality: of JPEG.
    """

    size: tuple[int, int]
    digit: int
    at: tuple[int, int]
    pen: float
    slant: float = 0.1
    ink: tuple[int, int, int] = (25, 28, 40)
    paper: tuple[int, int, int] = (240, 238, 230)
    light: float = 0.2
    noise: float = 2.0
    ruled: int = 0
    kind: str = "jpg"
    orientation: int = 1
    quality: int = 60


SHEETS = {
    "0a": Sheet((480, 640), 300, (150, 160), 17),
    "0b": Sheet((600, 450), 210, (330, 60), 8, 0.05, ink=(30, 50, 130), light=0.35),
    "1a": Sheet((300, 300), 170, (150, 60), 9, 0.12, kind="png", noise=0, light=0),
    "1b": Sheet((640, 480), 260, (90, 130), 14, 0.05, ink=(60, 60, 66), paper=(214, 205, 186), light=0.3),
    "2a": Sheet((480, 480), 270, (120, 90), 22, 0.05, ink=(20, 20, 20)),
    "2b": Sheet((640, 480), 180, (380, 240), 7, 0.15, ink=(35, 45, 110), orientation=6),
    "3a": Sheet((400, 600), 230, (90, 240), 12, 0.08, ink=(40, 40, 48), light=0.45),
    "3b": Sheet((220, 260), 170, (40, 40), 10, 0.0, kind="png", noise=0, light=0.1, ink=(110, 20, 30)),
    "4a": Sheet((560, 420), 240, (180, 90), 11, 0.1, ruled=42),
    "4b": Sheet((480, 640), 280, (120, 220), 26, 0.02, ink=(15, 15, 18), paper=(250, 250, 248), orientation=8),
    "5a": Sheet((640, 480), 250, (220, 120), 13, 0.1, paper=(200, 198, 205), light=0.4, noise=4, quality=40),
    "5b": Sheet((420, 420), 200, (60, 150), 6, 0.15, ink=(85, 85, 92), light=0.15),
    "6a": Sheet((480, 640), 260, (170, 100), 15, 0.05, ink=(30, 60, 40), paper=(235, 230, 180)),
    "6b": Sheet((640, 640), 150, (80, 420), 8, 0.12, light=0.3, orientation=3),
    "7a": Sheet((360, 480), 280, (70, 90), 19, 0.0, ink=(10, 10, 90), light=0.25),
    "7b": Sheet((250, 250), 160, (60, 40), 8, 0.08, kind="png", noise=0, light=0.0, paper=(255, 255, 255)),
    "8a": Sheet((640, 480), 230, (260, 90), 10, 0.12, ink=(50, 50, 60), light=0.4),
    "8b": Sheet((480, 480), 300, (100, 90), 24, 0.0, ink=(120, 30, 60), paper=(245, 240, 240)),
    "9a": Sheet((480, 640), 220, (200, 300), 12, 0.05, ruled=48, light=0.3),
    "9b": Sheet((600, 450), 240, (90, 80), 14, 0.1, ink=(70, 70, 70), paper=(225, 222, 215), noise=4, quality=45),
}


def curve(points: list[tuple[int, int]]) -> NDArray[np.float64]:
    """Return a smooth curve through the points, 40 for each of their steps (Catmull-Rom), (n, 2)."""
    through = np.array([points[0], *points, points[-1]], np.float64)
    pieces = []
    for a, b, c, d in zip(through, through[1:], through[2:], through[3:], strict=False):
        t = np.linspace(0, 1, 40)[:, np.newaxis]
        pieces.append(0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3))
    return np.concatenate(pieces)


def wobble(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a slow, small, random movement, about -1 to 1, (count,)."""
    steps = np.linspace(0, 1, count)
    return sum(
        (np.sin(2 * np.pi * (wave * steps + rng.random())) * rng.normal() / wave for wave in (1, 2, 3, 5)),
        start=np.zeros(count),
    )


def drawn(name: str, sheet: Sheet, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the ink of a digit on its sheet, from 0 to 1, (h, w)."""
    scale = 3
    paper = Image.new("L", (scale * sheet.size[0], scale * sheet.size[1]))
    pen = ImageDraw.Draw(paper)
    for stroke in STROKES[name]:
        points = curve(stroke) / 100
        x, y = points[:, 0] + 0.006 * wobble(len(points), rng), points[:, 1] + 0.006 * wobble(len(points), rng)
        x = sheet.at[0] + sheet.digit * (x + sheet.slant * (1 - y))
        y = sheet.at[1] + sheet.digit * y
        width = sheet.pen * (1 + 0.12 * wobble(len(points), rng))
        for across, down, radius in zip(x * scale, y * scale, width * scale / 2, strict=True):
            pen.ellipse((across - radius, down - radius, across + radius, down + radius), fill=255)
    soft = paper.resize(sheet.size, Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(sheet.pen / 14))
    return np.asarray(soft, np.float64) / 255


def picture(name: str, sheet: Sheet, rng: np.random.Generator) -> Image.Image:
    """Return a photograph of the sheet."""
    ink = drawn(name, sheet, rng)[..., np.newaxis]
    height, width = ink.shape[:2]
    colours = np.full((height, width, 3), sheet.paper, np.float64)
    if sheet.ruled:
        colours[:: sheet.ruled] -= (45, 30, 12)
    colours = colours * (1 - ink) + np.array(sheet.ink, np.float64) * ink
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    angle = rng.random() * np.pi / 2
    colours *= (1 - sheet.light * (np.cos(angle) * x + np.sin(angle) * y) ** 1.5)[..., np.newaxis]
    colours += rng.normal(0, sheet.noise, (height, width, 1))
    return Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))


def save(image: Image.Image, sheet: Sheet, path: Path) -> None:
    """Write a picture as the camera would that was turned."""
    turns = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    if (turn := turns[sheet.orientation]) is not None:
        image = image.transpose(turn)
    if sheet.kind == "png":
        image.quantize(32).save(path, optimize=True)
        return
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = sheet.orientation
    image.save(path, quality=sheet.quality, exif=exif, optimize=True)


def main(folder: Path) -> None:
    rng = np.random.default_rng(20)
    for name, sheet in SHEETS.items():
        save(picture(name, sheet, rng), sheet, folder / f"{name}.{sheet.kind}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
