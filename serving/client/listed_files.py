"""The files that the command line lists, and the progress through them."""

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from serving.client.errors import CapsNetError, InvalidRequest, ItemError
from serving.client.sources import parse


@dataclass(frozen=True)
class Place:
    """The name under which a result is shown.

    stem: the beginning of the names of files that belong to it. error: why the file could not be read; such a file gets
    no result. Empty for an image that was sent.
    """

    name: str
    stem: str
    error: str = ""


class ListedFiles:
    """An iterable of the files' images, at most ``limit`` in all.

    places: the name or the error of each item, in order. The caller removes one for each result.
    """

    def __init__(self, paths: Sequence[Path], limit: int | None, progress: "tqdm[Any]") -> None:
        self._paths = paths
        self._left = sys.maxsize if limit is None else limit
        self._progress = progress
        self._limit = self._left
        self.places: deque[Place] = deque()
        #: False once an image got no result.
        self.all_well = True

    def __iter__(self) -> Iterator[bytes | NDArray[np.uint8]]:
        for path in self._paths:
            if self._left <= 0:
                return
            stem = path.name.removesuffix(".gz").rpartition(".")[0] or path.name.removesuffix(".gz")
            try:
                content = parse(path.read_bytes())
            except (OSError, ItemError) as error:
                self.places.append(Place(str(path), stem, getattr(error, "strerror", None) or str(error)))
                continue
            if isinstance(content, bytes):
                self._left -= 1
                self.places.append(Place(str(path), stem))
                yield content
                continue
            assert isinstance(content, np.ndarray)
            images = content[: self._left]
            self._left -= len(images)
            self._progress.total = min(self._limit, (self._progress.total or 0) + len(images) - 1)
            for index, image in enumerate(images):
                self.places.append(Place(f"{path}[{index}]", f"{stem}-{index}"))
                yield image

    def next_place(self) -> Place:
        """Remove and return the place of the next result, after telling the errors of unreadable files before it."""
        self.tell_unreadable()
        return self.places.popleft()

    def tell_unreadable(self) -> None:
        """Tell the errors of the unreadable files before the next image."""
        while self.places and self.places[0].error:
            place = self.places.popleft()
            self._tell(place, place.error)

    def tell_done(self) -> None:
        """Count an image that got its result."""
        self._progress.update()

    def tell_error(self, place: Place, error: CapsNetError) -> None:
        """Tell why an image got no result."""
        self._tell(place, error.reason if isinstance(error, InvalidRequest) else str(error))

    def _tell(self, place: Place, error: str) -> None:
        self.all_well = False
        self.tell_line(f"{place.name}: {error}")
        self._progress.update()

    def tell_line(self, line: str) -> None:
        """Print a line beside the results."""
        with self._progress.external_write_mode(file=sys.stderr):
            print(line, file=sys.stderr)
