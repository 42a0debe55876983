"""The files of a run's folder, by name.

This module does not import PyTorch, so that a folder that cannot be used is refused at once.
"""

from pathlib import Path

SETTINGS_FILE = "settings.json"
RESUME_FILE = "last.ckpt"
BEST_FILE = "best.ckpt"
CHECKPOINT_FILE = "capsnet.pt"
TENSORS_FILE = "checkpoint.safetensors"
REPORT_FILE = "report.md"


def checkpoint_path(path: Path) -> Path:
    """Return the finished network's file if the path is the folder of a run or an artifact, else the path itself."""
    if not path.is_dir():
        return path
    tensors = path / TENSORS_FILE
    return tensors if tensors.exists() and not (path / CHECKPOINT_FILE).exists() else path / CHECKPOINT_FILE
