"""The rows, one module each; a module has ``ROW``."""

from importlib import import_module
from importlib.util import find_spec

from training.claims.row import Row

MODULES = (
    "accuracy", "confidence", "equivariance", "affine", "little_data", "few_parameters", "readable_poses",
    "routing_parts", "hierarchy", "overlap", "white_box", "one_pixel", "detection", "crowding", "background",
    "one_class",
)  # fmt: skip


def rows() -> list[Row]:
    """Return all rows in their order."""
    names = [f"{__name__}.{name}" for name in MODULES]
    return [import_module(name).ROW for name in names if find_spec(name)]
