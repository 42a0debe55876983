"""The files of a run's folder, by name.

This module does not import PyTorch, so that a folder that cannot be used is refused at once.
"""

from pathlib import Path

SETTINGS_FILE = "settings.json"
RESUME_FILE = "last.ckpt"
BEST_FILE = "best.ckpt"
CHECKPOINT_FILE = "capsnet.pt"
REPORT_FILE = "report.md"


def checkpoint_path(path: Path) -> Path:
    """Return the finished network's file if the path is a run's folder, else the path itself."""
    return path / CHECKPOINT_FILE if path.is_dir() else path
