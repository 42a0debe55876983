"""Where files that can be had again are kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/capsnet``, or ``~/.cache/capsnet``; it need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capsnet"
