"""The CSV files of the benchmarks: their figures, with the machine and versions they were measured on."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from serving.runtime import onnxruntime, usable_cores
from training.provenance import commit, processor


def origin() -> dict[str, Any]:
    """Return the machine, the versions of what is measured, and the commit, by column."""
    return {
        "device": processor(),
        "cores": usable_cores(),
        "onnxruntime": onnxruntime().__version__,
        "grpcio": grpc.__version__,
        "commit": commit(),
    }


def write(file: Path, rows: Sequence[Mapping[str, Any]], columns: Iterable[str] = ()) -> None:
    """Write a CSV file with a line for each row. columns: by default those of the first row."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(columns) or list(rows[0]), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
