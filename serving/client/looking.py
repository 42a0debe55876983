"""``--explain`` and ``--reconstruct`` of the command line: look inside the answers for the listed files."""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.client.base import Deadline
from serving.client.drawing import Drawing, Terminal, overlay, picture_of, strip, to_png
from serving.client.errors import InvalidImage
from serving.client.explanations import Explanation
from serving.client.listed_files import ListedFiles, Place
from serving.client.reconstructions import Reconstruction
from serving.client.results import Classification
from serving.client.sync import CapsNetClient
from serving.client.texts import classification_lines, explanation_lines, shown

# The size of a pixel in pictures that are only looked at. Images keep their size, so that they can be sent again.
_SCALE = 8
# The timeout of a call that begins when the time for all images is over.
_MIN_TIMEOUT_SECONDS = 0.001


class Looking:
    """Prints, draws and writes what explanations and reconstructions show."""

    def __init__(self, client: CapsNetClient, options: argparse.Namespace, bar: str) -> None:
        """Prepare for one run. bar: the character of the bars."""
        self._client = client
        self._options = options
        self._bar = bar
        self._terminal = Terminal.of(sys.stdout, os.environ)
        self._deadline = Deadline(options.timeout)

    def look(self, files: ListedFiles) -> None:
        """Print a result or an error for each image. Raises CapsNetError for errors that are not of one image."""
        for content in files:
            place = files.next_place()
            try:
                explanation, reconstructions = self._ask(content)
            except InvalidImage as error:
                files.tell_error(place, error)
                continue
            written = self._write(place, explanation, reconstructions)
            if self._options.json:
                print(self._as_json(place, explanation, reconstructions, written))
            else:
                print("\n".join(self._as_lines(place, explanation, reconstructions)))
            for path in written:
                files.tell_line(f"wrote {path}")
            files.tell_done()
        files.tell_unreadable()

    def _ask(self, content: bytes | NDArray[np.uint8]) -> tuple[Explanation | None, list[Reconstruction]]:
        options = self._options
        common: dict[str, Any] = {
            "classes": options.classes,
            "resize": options.resize,
            "preprocess": options.preprocess,
        }
        explanation, reconstructions = None, []
        if options.explain:
            [explanation] = self._client.explain(content, timeout=self._timeout(), **common)
        if options.reconstruct:
            changes = dict(options.change) if options.change else None
            reconstructions = self._client.reconstruct(
                content, changes=changes, sweep=options.sweep, timeout=self._timeout(), **common
            )
        return explanation, reconstructions

    def _timeout(self) -> float | None:
        left = self._deadline.left()
        return None if left is None else max(left, _MIN_TIMEOUT_SECONDS)

    def _write(
        self, place: Place, explanation: Explanation | None, reconstructions: Sequence[Reconstruction]
    ) -> list[Path]:
        """Write PNG files into the folder of ``--out``, if it is given, and return their paths."""
        if self._options.out is None:
            return []
        files: list[tuple[str, bytes]] = []
        if explanation:
            files.append(("image", _image_file(explanation.pixels)))
            for one in explanation.classes:
                if one.relevance.size:
                    picture = overlay(explanation.pixels, one.relevance)
                    files.append((f"relevance-{one.label}", to_png(picture, _SCALE)))
        if self._options.sweep:
            for row in _rows(reconstructions, self._options.sweep.steps):
                picture = strip([picture_of(drawn.image) for drawn in row])
                files.append((f"sweep-{self._options.sweep.dimension}-{row[0].label}", to_png(picture, _SCALE)))
        else:
            files += [(f"reconstruction-{one.label}", _image_file(one.image)) for one in reconstructions]
        files += [(f"layer-{one.label}", _image_file(one.layer)) for one in reconstructions if one.layer is not None]
        return [write_new(self._options.out, f"{place.stem}-{name}", content) for name, content in files]

    def _as_json(
        self,
        place: Place,
        explanation: Explanation | None,
        reconstructions: Sequence[Reconstruction],
        written: Sequence[Path],
    ) -> str:
        numbers = {"image": place.name, **_classification(explanation, reconstructions).to_dict()}
        if explanation:
            numbers["explanation"] = explanation.to_dict()
        if self._options.reconstruct:
            numbers["reconstructions"] = [one.to_dict() for one in reconstructions]
        if self._options.out is not None:
            numbers["files"] = [str(path) for path in written]
        return json.dumps(numbers)

    def _as_lines(
        self, place: Place, explanation: Explanation | None, reconstructions: Sequence[Reconstruction]
    ) -> list[str]:
        drawings = []
        lines = classification_lines(shown(place.name), _classification(explanation, reconstructions), self._bar)
        if explanation:
            lines += explanation_lines(explanation)
            drawings.append(Drawing("image", picture_of(explanation.pixels)))
            drawings += [
                Drawing(f"relevance for {one.label}", overlay(explanation.pixels, one.relevance), one.relevance)
                for one in explanation.classes
                if one.relevance.size
            ]
        for one in reconstructions:
            change = f" {one.delta:+.3g}" if self._options.sweep else ""
            drawings.append(Drawing(f"drawn {one.label}{change}", picture_of(one.image)))
            if one.layer is not None:
                drawings.append(Drawing(f"part of {one.label}", picture_of(one.layer)))
        return lines + self._terminal.lines(drawings)


def write_new(folder: Path, stem: str, content: bytes) -> Path:
    """Write a PNG file into a folder, which is made if it is missing, and return its path.

    A file that exists is kept: the new one's name gets a number. Characters that no file's name should have become
    underscores. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    safe = re.sub(r"[^\w.+-]+", "_", stem)
    for number in count(1):
        path = folder / (f"{safe}.png" if number == 1 else f"{safe}-{number}.png")
        try:
            with path.open("xb") as file:
                file.write(content)
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable")


def _classification(explanation: Explanation | None, reconstructions: Sequence[Reconstruction]) -> Classification:
    """Return the classification of the image; that of a reconstruction has the reconstruction error."""
    found = reconstructions[0].classification if reconstructions else None
    result = found or (explanation.classification if explanation else None)
    assert result is not None
    return result


def _image_file(image: NDArray[np.uint8]) -> bytes:
    """Return an image (C, H, W) as a PNG file."""
    return to_png(image if len(image) == 1 else picture_of(image))


def _rows(reconstructions: Sequence[Reconstruction], steps: int) -> list[Sequence[Reconstruction]]:
    """Return the reconstructions of each pose of a sweep."""
    return [reconstructions[first : first + steps] for first in range(0, len(reconstructions), steps)]
