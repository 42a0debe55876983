"""The folder of a run of the claims: each network's weights, scores and figures, and each row's measurements.

``runs/JOB/figures.json`` is written last, so a run with it is complete. Files get their names when they are complete.
"""

import fcntl
import io
import json
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from training.claims.jobs import SHAPES, Job
from training.claims.nets import CapsuleNet, NetSpec, PlainNet, build

Arrays = dict[str, NDArray[Any]]

_FIGURES = "figures.json"
_SECONDS = "_seconds"  # the name of the time that kept arrays took
_WEIGHTS = "weights.safetensors"
_LOCK = "lock"


class RunFolderError(RuntimeError):
    """The folder of a run cannot be used. The text names it and says why."""


class DamagedRunError(RunFolderError):
    """A file of a run cannot be read. The text names it."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes from working on a run's folder. Raises RunFolderError if one does, or if it is read-only.

    A killed process releases its lock.
    """
    try:
        file = (folder / _LOCK).open("w")
    except OSError as error:
        raise RunFolderError(f"--out: nothing can be written into {folder}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(f"{folder} is in use by another run; wait for it, or give another --out") from error
        yield


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raise DamagedRunError where the content of a file turns out to be no content of its kind."""
    try:
        yield
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, SafetensorError) as error:
        advice = "remove it, or its folder if that is in runs or rows, and the run makes it again"
        raise DamagedRunError(f"{file} is damaged; {advice}") from error


def spec_of(job: Job) -> NetSpec:
    """Return the description of a job's network."""
    return NetSpec(job.kind, job.size, *SHAPES[job.images])


@dataclass(frozen=True)
class Store:
    """The files of one run in a folder."""

    folder: Path

    def finished(self, job: Job) -> bool:
        """Return True if the job's network was trained and scored, and its weights are there if the job keeps them."""
        run = self._run(job)
        return (run / _FIGURES).exists() and (not job.keep or (run / _WEIGHTS).exists())

    def write(self, job: Job, net: nn.Module, scores: Mapping[str, Arrays], figures: dict[str, Any]) -> None:
        """Write a trained network's files: weights if the job keeps them, arrays by evaluation set, figures."""
        run = self._run(job)
        run.mkdir(parents=True, exist_ok=True)
        if job.keep:
            write_file(run / _WEIGHTS, save_tensors({name: value.cpu() for name, value in stored(net).items()}))
        for name, arrays in scores.items():
            _write_arrays(run / f"{name}.npz", arrays)
        write_file(run / _FIGURES, json.dumps(figures, indent=1).encode())

    def net(self, job: Job) -> CapsuleNet | PlainNet:
        """Return a trained network, on the CPU.

        Raises FileNotFoundError if its weights are not there, and DamagedRunError if they cannot be read.
        """
        net = build(spec_of(job))
        file = self._run(job) / _WEIGHTS
        with reading(file):
            weights = load_tensors(file.read_bytes())
        own = net.state_dict()
        net.load_state_dict({name: value.to(own[name].dtype) for name, value in weights.items()})
        return net

    def arrays(self, job: Job, name: str) -> Arrays:
        """Return the arrays of an evaluation set. Raises FileNotFoundError if the network was not scored on it."""
        return _read_arrays(self._run(job) / f"{name}.npz")

    def figures(self, job: Job) -> dict[str, Any]:
        """Return the figures of a trained network. Raises FileNotFoundError without one."""
        file = self._run(job) / _FIGURES
        with reading(file):
            figures: dict[str, Any] = json.loads(file.read_text())
        return figures

    def kept(self, key: str, compute: Callable[[], Arrays]) -> tuple[Arrays, float]:
        """Return the arrays of ``measured/KEY.npz``, and the seconds that an earlier run spent on them.

        They are computed and written first if there is no such file; then the seconds are 0.
        """
        file = self.folder / "measured" / f"{key}.npz"
        if file.exists():
            arrays = _read_arrays(file)
            return arrays, float(arrays.pop(_SECONDS, 0.0))
        file.parent.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        found = compute()
        _write_arrays(file, found | {_SECONDS: np.array(time.perf_counter() - begin)})
        return found, 0.0

    def _run(self, job: Job) -> Path:
        return self.folder / "runs" / job.name


def stored(net: nn.Module) -> dict[str, Tensor]:
    """Return a network's state as it is stored: weights in half precision, statistics of normalisation in single."""
    weights = {name for name, _ in net.named_parameters()}
    return {
        name: (value.detach().half() if name in weights else value.detach()).contiguous()
        for name, value in net.state_dict().items()
    }


def round_weights(net: nn.Module) -> None:
    """Round a network's weights to those that are stored, so that its scores are those of the stored network."""
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(weight.half())


def write_file(file: Path, content: bytes) -> None:
    """Write a file completely or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(content)
    partial.replace(file)


def _write_arrays(file: Path, arrays: Arrays) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_file(file, content.getvalue())


def _read_arrays(file: Path) -> Arrays:
    with reading(file), np.load(io.BytesIO(file.read_bytes())) as arrays:
        return dict(arrays)
