"""What the benchmarks write down: their figures, and what they were measured with."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from serving.runtime import onnxruntime, usable_cores
from training.provenance import commit, processor


def origin() -> dict[str, Any]:
    """The machine, the versions of what was measured, and the commit, by their columns."""
    return {
        "device": processor(),
        "cores": usable_cores(),
        "onnxruntime": onnxruntime().__version__,
        "grpcio": grpc.__version__,
        "commit": commit(),
    }


def write(file: Path, rows: Sequence[Mapping[str, Any]], columns: Iterable[str] = ()) -> None:
    """A CSV file with a line for each row. columns: those of the first row where they are not given."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(columns) or list(rows[0]), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
