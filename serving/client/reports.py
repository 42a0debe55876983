"""Results of many images on the command line: bars for a few, a table and a summary for many, or JSON."""

import json
import sys
import time

from serving.client.listed_files import Place
from serving.client.results import Classification, Verdict
from serving.client.scores import Tally, TrueLabels, is_right, label_of
from serving.client.texts import classification_lines, shown

#: The most images whose lengths and pose are printed one below the other.
MAX_DETAILED_IMAGES = 4
_MAX_NAME_CHARACTERS = 48
_PREPARATION_HINT = (
    "try --preprocess auto for images that differ from the training images, such as photographs of paper"
)
_HEADINGS = ("image", "label", "confidence", "verdict")


class Report:
    """Prints results as they come. The first few wait until it is clear whether there are many."""

    def __init__(self, as_json: bool, labels: TrueLabels | None, bar: str, is_prepared: bool) -> None:
        """Prepare a report. bar: the character of the bars. is_prepared: True if the server prepares the images."""
        self._tally = Tally()
        self._as_json = as_json
        self._labels = labels
        self._bar = bar
        self._waiting: list[tuple[Place, Classification]] = []
        self._is_table = False
        self._is_prepared = is_prepared
        self._begin = time.monotonic()

    def add(self, place: Place, result: Classification) -> None:
        """Print a result, or keep it until more have come."""
        self._tally.add(result, self._true_label(place))
        if self._as_json:
            print(json.dumps(self._numbers(place, result)))
            return
        self._waiting.append((place, result))
        if self._is_table or len(self._waiting) > MAX_DETAILED_IMAGES:
            self._print_rows()

    def end(self, failures: int) -> None:
        """Print the results that wait, and the summary of many images, errors or true labels.

        failures: the number of images without a result.
        """
        for place, result in self._waiting:
            print("\n".join(classification_lines(shown(place.name), result, self._bar)))
        self._waiting.clear()
        if self._is_table or self._labels or failures > MAX_DETAILED_IMAGES:
            lines = self._tally.lines(failures, time.monotonic() - self._begin, self._labels is not None)
            for line in lines:  # those of JSON stay alone on the standard output
                print(line, file=sys.stderr if self._as_json else sys.stdout)
        if self._tally.has_strange_images and not (self._is_prepared or self._as_json):
            print(_PREPARATION_HINT, file=sys.stderr)

    def _print_rows(self) -> None:
        if not self._is_table:
            self._is_table = True
            headings = [*_HEADINGS, *(["true label"] if self._labels else [])]
            print(_row(headings))
        for place, result in self._waiting:
            cells = [_shortened(shown(place.name)), result.label, *_judged(result)]
            if (true_label := self._true_label(place)) is not None:
                cells.append(label_of(result, true_label) + ("" if is_right(result, true_label) else "  wrong"))
            print(_row(cells))
        self._waiting.clear()

    def _true_label(self, place: Place) -> str | None:
        return self._labels.of(place.name, place.path, place.number) if self._labels else None

    def _numbers(self, place: Place, result: Classification) -> dict[str, object]:
        numbers = {"image": place.name, **result.to_dict()}
        if (true_label := self._true_label(place)) is not None:
            numbers |= {"true_label": label_of(result, true_label), "is_right": is_right(result, true_label)}
        return numbers


def _judged(result: Classification) -> tuple[str, str]:
    """Return the confidence and the verdict, or the length if the model has no calibration."""
    if result.verdict is Verdict.UNKNOWN:
        return f"({result.probability:.3f})", "-"
    return f"{result.confidence:.3f}", str(result.verdict)


def _row(cells: list[str]) -> str:
    name, label, confidence, verdict, *others = cells
    line = f"{name:<{_MAX_NAME_CHARACTERS}} {label:<12} {confidence:>10} {verdict:<13} {' '.join(others)}"
    return line.rstrip()


def _shortened(name: str) -> str:
    """Return the end of a long name, which tells files of one folder apart."""
    return name if len(name) <= _MAX_NAME_CHARACTERS else f"...{name[3 - _MAX_NAME_CHARACTERS :]}"
