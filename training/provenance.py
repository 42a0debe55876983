"""Where a run's figures come from: the command, the commit and the device."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def provenance(device: torch.device) -> dict[str, Any]:
    """What one needs to repeat a run: ``command``, ``commit``, ``device`` and ``torch``, all texts.

    commit: of the source as git knows it, with ``+changes`` where files differ from it; empty outside a checkout.
    """
    return {
        "command": _command(),
        "commit": _commit(),
        "device": _processes() + _name(device),
        "torch": str(torch.__version__),
    }


def _command() -> str:
    words = [word for word in sys.orig_argv[1:] if word != "-u"]  # which torchrun adds
    nodes = _count("WORLD_SIZE") // _count("LOCAL_WORLD_SIZE")
    if _count("WORLD_SIZE") == 1:
        return shlex.join(["python", *words])
    machines = [f"--nnodes={nodes}"] if nodes > 1 else []
    return shlex.join(["torchrun", *machines, f"--nproc-per-node={_count('LOCAL_WORLD_SIZE')}", *words])


def _count(variable: str) -> int:
    """One of the numbers of processes that torchrun sets."""
    return int(os.environ.get(variable, 1))


def _commit() -> str:
    source = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(["git", *arguments], cwd=source, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--", "."))
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+changes" if changes else "")


def _processes() -> str:
    """``2 x`` and so on where torchrun has started several processes."""
    count = _count("WORLD_SIZE")
    return f"{count} x " if count > 1 else ""


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def processor() -> str:
    """The name of this machine's processor, as Linux has it; ``CPU`` elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
