"""Tests of training in real processes: two at once, killed without warning, and in mixed precision."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.conftest import ROOT
from tests.trainings import process_state
from training import checkpoint as checkpoints
from training.__main__ import main

__all__ = ["process_state"]  # a fixture that surrounds every run

STEPS_PER_EPOCH = 7
# Train, and kill the process right after a step. The moment does not depend on the machine's speed.
KILLED_IN_MID_EPOCH = """
import os, runpy, signal, sys
from torch.optim.optimizer import register_optimizer_step_post_hook

steps = []

def count(*_):
    steps.append(None)
    if len(steps) == {step}:
        os.kill(os.getpid(), signal.SIGKILL)

register_optimizer_step_post_hook(count)
sys.argv = ["training", *{arguments}]
runpy.run_module("training", run_name="__main__", alter_sys=True)
"""
FLAGS = [
    "--epochs=3", "--batch-size=16", "--learning-rate=0.005", "--warmup-epochs=0.5", "--ema-decay=0.8", "--held-out=20",
    "--conv-channels=8", "--primary-types=2", "--decoder-widths=16", "--deterministic",
    "--min-epoch-steps=0", "--precision=32-true",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 150 small images: noise with a bar at the top, at the left, or a square at the bottom right."""
    folder = tmp_path_factory.mktemp("data") / "bars"
    generator = torch.Generator().manual_seed(1)
    bars = {
        "lying": (slice(3, 9), slice(3, 17)),
        "standing": (slice(3, 17), slice(3, 9)),
        "square": (slice(10, 17),) * 2,
    }
    for label, place in bars.items():
        (folder / label).mkdir(parents=True)
        for number in range(50):
            pixels = torch.randint(0, 60, (20, 20), generator=generator)
            pixels[place] += 190
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / label / f"{number:02}.png")
    return folder


def command(data: Path, out: Path, *flags: str) -> list[str]:
    return ["-m", "training", f"--data={data}", f"--out={out}", *FLAGS, *flags]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def run(*arguments: str, **more: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run of one process: this one, which has loaded PyTorch already."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(command(data, folder)[2:]) == 0
    return folder


def logged(folder: Path, name: str) -> list[float]:
    (log,) = folder.glob("logs/*/metrics.csv")
    with log.open() as lines:
        return [float(row[name]) for row in csv.DictReader(lines) if row[name]]


def weights(folder: Path) -> dict[str, Tensor]:
    return checkpoints.load(folder / "capsnet.pt").state_dict


def figures(folder: Path) -> dict[str, Any]:
    return checkpoints.load(folder / "capsnet.pt").figures


def test_two_processes_have_the_losses_of_one_and_end_with_its_weights(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    output = run(*launcher, *command(data, tmp_path))

    assert output.count("test error") == 1
    for name in ("classification_loss_epoch", "reconstruction_loss_epoch", "held_out_loss"):
        assert logged(tmp_path, name) == pytest.approx(logged(undisturbed, name), rel=1e-5), name
    for name, value in weights(undisturbed).items():
        torch.testing.assert_close(weights(tmp_path)[name], value, rtol=1e-3, atol=1e-5)
    together, alone = (figures(folder) for folder in (tmp_path, undisturbed))
    assert together["device"].startswith("2 x ")
    assert together["command"].startswith("torchrun --nproc-per-node=2 -m training ")
    assert together["test_mistakes"] == alone["test_mistakes"]


def test_a_run_killed_in_mid_epoch_and_resumed_ends_with_the_weights_of_an_undisturbed_one(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    arguments = command(data, tmp_path / "run")[2:]
    script = KILLED_IN_MID_EPOCH.format(step=STEPS_PER_EPOCH + 4, arguments=arguments)
    killed = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / "capsnet.pt").exists()

    assert main([*arguments, "--resume"]) == 0  # in this process, which has loaded PyTorch already

    for name, value in weights(undisturbed).items():
        assert weights(tmp_path / "run")[name].equal(value), name


def test_mixed_precision_trains_as_well_and_keeps_weights_in_single(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    # Some virtual machines announce oneDNN's newest matrix instructions but cannot execute them.
    run(*command(data, tmp_path, "--precision=bf16-mixed", "--gradient-clip=1"), ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16")
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float32}
    mixed, single = (logged(folder, "classification_loss_epoch") for folder in (tmp_path, undisturbed))
    assert mixed[-1] < 0.6 * mixed[0]
    assert mixed != single
    assert figures(tmp_path)["command"].startswith("python -m training ")


def test_every_run_logs_for_tensorboard_too(undisturbed: Path) -> None:
    assert list(undisturbed.glob("logs/version_0/events.out.tfevents.*"))
