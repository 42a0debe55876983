"""``python -m benchmarks.gpu.steps``: training steps a second, eager, compiled, and each recorded as a CUDA graph."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import write
from benchmarks.gpu.training import PAIR_CANVAS
from training.model import CONFIGS, CapsNet
from training.provenance import commit, processor
from training.recorded.chunks import Digits, Distortion
from training.recorded.learner import Hyperparameters, Learner, total_loss, training_device, wait

WAYS = {"eager": (False, False), "compiled": (True, False), "graph": (False, True), "compiled graph": (True, True)}


def measure(name: str, batch: int, way: str, steps: int, device: torch.device) -> dict[str, Any]:
    """Return images and steps a second of one network's whole training step, averaging included."""
    compiled, graph = WAYS[way]
    images = torch.randint(256, (20 * batch, 1, 28, 28), dtype=torch.uint8, device=device)
    labels = torch.randint(10, (20 * batch,), device=device)
    if CONFIGS[name].image_size == PAIR_CANVAS:
        images = torch.nn.functional.pad(images, (4, 4, 4, 4))
    config = replace(CONFIGS[name], image_size=images.shape[-1])
    chunk = Digits(images, labels, batch, 1, Distortion(), False)()
    begin = time.perf_counter()
    learner = Learner(partial(CapsNet, config), total_loss, 1, Hyperparameters(), 10_000, device, compiled=compiled)
    learner.prepare(chunk, graph=graph)
    for _ in range(3):
        learner.step()
    wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        learner.step()
    wait(device)
    seconds = (time.perf_counter() - start) / steps
    return {
        "config": name,
        "batch": batch,
        "way": way,
        "step_ms": f"{1000 * seconds:.4g}",
        "images_per_second": f"{batch / seconds:.4g}",
        "prepare_s": f"{start - begin:.3g}",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.steps", allow_abbrev=False)
    parser.add_argument("--case", action="append", default=[], metavar="CONFIG:BATCH", required=True)
    parser.add_argument("--way", action="append", choices=WAYS, help="(default: all)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    device = training_device()
    options.out.mkdir(parents=True, exist_ok=True)
    origin = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "torch": str(torch.__version__),
        "commit": commit(),
    }
    rows: list[dict[str, Any]] = []
    for case in options.case:
        name, batch = case.split(":")
        for way in options.way or WAYS:
            try:
                rows.append(measure(name, int(batch), way, options.steps, device) | origin)
            except Exception as error:  # the other ways must still run
                print(f"{case} {way}: {type(error).__name__} {' '.join(str(error).split())[:600]}", flush=True)
                continue
            print(rows[-1], flush=True)
            write(options.out / "steps.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
