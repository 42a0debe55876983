"""The data sets of benchmarks."""

import argparse
import sys

from training.data.datasets import Dataset, load
from training.data.sources import DatasetError


def load_or_exit(name: str, options: argparse.Namespace) -> Dataset:
    """Return a data set, found by the flags of ``add_file_flags``. Exits with the reasons if no source has it."""
    try:
        return load(name, options.data_dir, options.source, progress=False)
    except DatasetError as error:
        sys.exit(str(error))
