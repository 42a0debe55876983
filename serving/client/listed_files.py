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

from serving.client.errors import SIZE_HINT, CapsNetError, InvalidRequest, ItemError
from serving.client.found_files import Found
from serving.client.sources import mistaken_text, named, parse
from serving.client.texts import shown

_EXPECTED = "expected a path, or - to read the file from the standard input"
_SIZE_OPTIONS_HINT = "(--resize scales it, --preprocess auto finds the object in it)"


@dataclass(frozen=True)
class Place:
    """The name under which a result is shown.

    stem: the beginning of the names of files that belong to it. path: the file of the image. number: of the image among
    all, from 0. error: why the file could not be read; such a file gets no result. Empty for an image that was sent.
    """

    name: str
    stem: str
    path: Path
    number: int
    error: str = ""


class ListedFiles:
    """An iterable of the files' images, at most ``limit`` in all.

    places: the name or the error of each item, in order. The caller removes one for each result.
    """

    def __init__(self, files: Sequence[Found], limit: int | None, progress: "tqdm[Any]") -> None:
        self._files = files
        self._number = 0
        self._left = sys.maxsize if limit is None else limit
        self._progress = progress
        self._limit = self._left
        self.places: deque[Place] = deque()
        #: The number of images that got no result.
        self.failures = 0

    def __iter__(self) -> Iterator[bytes | NDArray[np.uint8]]:
        for file in self._files:
            if self._left <= 0:
                return
            path = file.path
            stem = path.name.removesuffix(".gz").rpartition(".")[0] or path.name.removesuffix(".gz")
            try:
                if file.error:
                    raise ItemError(file.error)
                content = parse(file.read())
            except (OSError, ValueError) as error:
                mistake = mistaken_text(file.name) if isinstance(error, OSError) else None
                reason = f"{mistake.found}; {_EXPECTED}" if mistake else getattr(error, "strerror", None) or str(error)
                self.places.append(Place(file.name, stem, path, self._number, reason))
                self._number += not file.error
                continue
            if isinstance(content, bytes):
                self._left -= 1
                self._append(file.name, stem, path)
                yield content
                continue
            assert isinstance(content, np.ndarray)
            images = content[: self._left]
            self._left -= len(images)
            self._progress.total = min(self._limit, (self._progress.total or 0) + len(images) - 1)
            for index, image in enumerate(images):
                self._append(f"{file.name}[{index}]", f"{stem}-{index}", path)
                yield image

    def _append(self, name: str, stem: str, path: Path) -> None:
        self.places.append(Place(name, stem, path, self._number))
        self._number += 1

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
        reason = error.reason if isinstance(error, InvalidRequest) else str(error)
        self._tell(place, reason.replace(SIZE_HINT, _SIZE_OPTIONS_HINT))

    def _tell(self, place: Place, error: str) -> None:
        self.failures += 1
        self.tell_line(f"{named(shown(place.name))}: {error}")
        self._progress.update()

    def tell_line(self, line: str) -> None:
        """Print a line beside the results."""
        with self._progress.external_write_mode(file=sys.stderr):
            print(shown(line), file=sys.stderr)
