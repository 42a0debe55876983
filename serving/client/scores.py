"""True labels of the images of a command line, and the summary of the answers."""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from serving.client.found_files import STANDARD_INPUT
from serving.client.results import Classification, Verdict
from serving.files.idx import GZIP_MAGIC, is_idx, read_idx

FOLDERS = "folders"
_SHOWN_CONFUSIONS = 5


class TrueLabels:
    """The true labels of images: by name, or in the order of the images."""

    def __init__(self, by_name: Mapping[str, str], in_order: Sequence[str], folders: bool = False) -> None:
        self._by_name = by_name
        self._in_order = in_order
        self._folders = folders

    @classmethod
    def read(cls, source: str) -> "TrueLabels":
        """Read labels from a file: IDX, a label a line, or NAME,LABEL a line. ``folders``: the names of the folders.

        Raises ValueError for another file, and for one that cannot be read.
        """
        if source == FOLDERS:
            return cls({}, (), folders=True)
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise ValueError(f"--labels: {source}: {error.strerror}; expected a file, or the word {FOLDERS}") from error
        if is_idx(data[:4]) or data.startswith(GZIP_MAGIC):
            labels = read_idx(data)
            if labels.ndim != 1:
                raise ValueError(f"--labels: {source} has {labels.ndim} dimensions; expected an IDX file of labels")
            return cls({}, [str(label) for label in labels.tolist()])
        try:
            rows = [row for row in csv.reader(data.decode("utf-8-sig").splitlines()) if row]
        except UnicodeDecodeError:
            raise ValueError(f"--labels: {source} is neither text nor IDX") from None
        if not rows or any(len(row) != len(rows[0]) for row in rows) or len(rows[0]) > 2:
            raise ValueError(f"--labels: {source}; expected LABEL or NAME,LABEL in each line, or an IDX file")
        if len(rows[0]) == 1:
            return cls({}, [row[0].strip() for row in rows])
        return cls({row[0].strip(): row[1].strip() for row in rows}, ())

    def of(self, name: str, path: Path, number: int) -> str | None:
        """Return an image's label, or None. name: as it is shown. number: of the image among all, from 0."""
        if self._folders:
            return None if str(path) == STANDARD_INPUT else path.absolute().parent.name
        if self._by_name:
            return self._by_name.get(name, self._by_name.get(path.name))
        return self._in_order[number] if number < len(self._in_order) else None


def is_right(result: Classification, true_label: str) -> bool:
    """Return True if a result has this label. A number that is no label of the model is the index of a class."""
    return label_of(result, true_label) == result.label


def label_of(result: Classification, true_label: str) -> str:
    """Return a true label as the model's own, if it has it."""
    if true_label in result.labels:
        return true_label
    labels_by_index = {str(index): label for index, label in enumerate(result.labels)}
    return labels_by_index.get(true_label, true_label)


class Tally:
    """The numbers of results by label, by verdict, and by true label."""

    def __init__(self) -> None:
        self._results = 0
        self._labels: Counter[str] = Counter()
        self._verdicts: Counter[str] = Counter()
        self._scored = 0
        self._right = 0
        self._unknown: set[str] = set()
        self._confusions: Counter[tuple[str, str]] = Counter()

    @property
    def has_strange_images(self) -> bool:
        """Return True if an image shows none of the model's classes."""
        return self._verdicts[str(Verdict.NONE_OF_THESE)] > 0

    def add(self, result: Classification, true_label: str | None) -> None:
        """Count a result."""
        self._results += 1
        self._labels[result.label] += 1
        if result.verdict is not Verdict.UNKNOWN:
            self._verdicts[str(result.verdict)] += 1
        if true_label is None:
            return
        expected = label_of(result, true_label)
        self._scored += 1
        self._right += expected == result.label
        if expected != result.label:
            self._confusions[expected, result.label] += 1
        if expected not in result.labels:
            self._unknown.add(expected)

    def lines(self, failures: int, seconds: float, has_labels: bool) -> list[str]:
        """Return the summary. failures: the images without a result. seconds: the time for all."""
        images = self._results + failures
        failed = f", {failures:,} without an answer" if failures else ""
        if not images:
            return []
        lines = [f"{images:,} image{'s' if images > 1 else ''} in {seconds:.1f} s{failed}"]
        if self._results:
            lines.append(f"  labels: {_counts(self._labels)}")
        if self._verdicts:
            lines.append(f"  verdicts: {_counts(self._verdicts)}")
        return [*lines, *self._score()] if has_labels else lines

    def _score(self) -> list[str]:
        if not self._scored:
            return ["  right: unknown, since no image has a true label"]
        share = 100 * self._right / self._scored
        lines = [f"  right: {self._right:,} of {self._scored:,} ({share:.2f} %)"]
        if missing := self._results - self._scored:
            lines.append(f"  without a true label: {missing:,}")
        if self._confusions:
            pairs = self._confusions.most_common(_SHOWN_CONFUSIONS)
            shown = ", ".join(f"{true} taken for {label} ({count})" for (true, label), count in pairs)
            lines.append(f"  most errors: {shown}")
        if self._unknown:
            lines.append(f"  true labels that the model does not have: {', '.join(sorted(self._unknown)[:10])}")
        return lines


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
