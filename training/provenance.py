"""The origin of a run's figures: the command, the commit and the device."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def provenance(device: torch.device) -> dict[str, Any]:
    """Collect the facts that are needed to repeat a run: ``command``, ``commit``, ``device`` and ``torch``, as texts.

    commit: git's commit of the source, with ``+changes`` if files differ from it; empty outside a checkout.
    """
    return {
        "command": _command(),
        "commit": commit(),
        "device": _processes() + _name(device),
        "torch": str(torch.__version__),
    }


def _command() -> str:
    words = [word for word in sys.orig_argv[1:] if word != "-u"]  # torchrun adds it
    nodes = process_count() // process_count("LOCAL_WORLD_SIZE")
    if process_count() == 1:
        return shlex.join(["python", *words])
    machines = [f"--nnodes={nodes}"] if nodes > 1 else []
    return shlex.join(["torchrun", *machines, f"--nproc-per-node={process_count('LOCAL_WORLD_SIZE')}", *words])


def process_count(variable: str = "WORLD_SIZE") -> int:
    """Count torchrun's processes, on all machines or, by ``LOCAL_WORLD_SIZE``, on this one; 1 without torchrun."""
    return int(os.environ.get(variable, 1))


def commit() -> str:
    """Return the commit of the source, as in ``provenance``."""
    source = Path(__file__).parent
    try:
        head, changes = (
            subprocess.run(["git", *arguments], cwd=source, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--", "."))
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+changes" if changes else "")


def _processes() -> str:
    """Return ``2 x`` and so on if torchrun has started several processes, else ""."""
    count = process_count()
    return f"{count} x " if count > 1 else ""


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def processor() -> str:
    """Return Linux's name of this machine's processor, or ``CPU`` on other systems."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
