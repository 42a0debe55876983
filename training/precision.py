"""The default arithmetic of a run: the fastest one of its device."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_ONEDNN_ISA = "ONEDNN_MAX_CPU_ISA"


def default_precision(cpuinfo: Path = CPUINFO) -> str:
    """Return ``bf16-mixed`` if the GPU, or without one the processor, multiplies bfloat16, else ``32-true``.

    A processor without such instructions would emulate them, slower than single precision.
    """
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = bool(BF16_FLAGS & _processor_flags(cpuinfo))
    return "bf16-mixed" if fast else "32-true"


def avoid_matrix_tiles() -> None:
    """Keep oneDNN in this process from using AMX, unless the environment chooses the instructions.

    Some virtual machines announce AMX and end a process that uses it with an illegal instruction.
    """
    os.environ.setdefault(_ONEDNN_ISA, "AVX512_CORE_BF16")


@contextmanager
def subnormals_flushed() -> Iterator[None]:
    """Take subnormal numbers for zero in this thread, and end with the treatment it had before.

    Subnormal gradients of settled capsules slow a CPU down many times. Left on, it would change the numbers of all
    that the process does afterwards: Python itself would read 1e-320 as 0.
    """
    already = sys.float_info.min / 2 == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(already)


def _processor_flags(cpuinfo: Path) -> set[str]:
    """Return the instruction sets that Linux reports for the first processor; none on other systems."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))
