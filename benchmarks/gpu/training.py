"""``python -m benchmarks.gpu.training``: train several networks side by side on one device, within a time budget.

Networks of one cohort are trained at once, each on a stream of its own, since one small network leaves most of a GPU
idle. The test images are read once a network, after its last step; no choice depends on them.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.data import load_or_exit
from benchmarks.gpu.recipes import DIGIT_CONFIGS, RECIPES, Recipe
from training.checkpoint import Checkpoint, CheckpointError, load, save
from training.data.datasets import Dataset, generate
from training.data.sources import add_file_flags
from training.evaluate import predict, wrong
from training.model import CONFIGS, CapsNet, CapsNetConfig
from training.provenance import commit
from training.recorded.chunks import Chunk, Digits, Distortion, Pairs
from training.recorded.learner import (
    Hyperparameters,
    Learner,
    learn,
    mean_lengths,
    on_device,
    total_loss,
    training_device,
    wait,
)

BATCH = 128
PAIR_BATCH = 1024
PAIR_CANVAS = 36
PAIRS = "multimnist"
MNIST = "mnist"
#: The networks of the phase ``paper``.
PAPER = ("paper", "authors")
#: The networks that learn from the teachers too, by phase.
STUDENTS = {"students": ("accurate", "fast"), "accurate-students": ("accurate",), "fast-students": ("fast",)}
#: The networks that may be teachers.
TEACHERS = [name for name in DIGIT_CONFIGS if name not in PAPER]
PHASES = ("teachers", *STUDENTS, "pairs", "paper")
DISTORTION = Distortion()
PAIR_CHUNK_STEPS = 64
PROBE_STEPS = 60  # their time decides how many epochs fit into the budget


@dataclass(frozen=True)
class Job:
    """One network to train on ``dataset``. The seed is for weights and data."""

    name: str
    config: str
    seed: int
    settings: Hyperparameters
    dataset: str = MNIST
    distortion: Distortion = DISTORTION
    none: bool = True


@dataclass(frozen=True)
class Box:
    """A time budget for training. epochs: the most epochs; for pairs, the most chunks."""

    seconds: float
    epochs: int


def data_of(job: Job, mnist: Dataset, device: torch.device, batch: int, pair_batch: int) -> Digits | Pairs:
    images, labels = mnist.train_images.to(device), mnist.train_labels.to(device)
    if job.dataset == PAIRS:
        return Pairs(images, labels, pair_batch, job.seed, PAIR_CANVAS, PAIR_CHUNK_STEPS)
    return Digits(images, labels, batch, job.seed, job.distortion, job.none)


def run(
    jobs: Sequence[Job],
    mnist: Dataset,
    box: Box,
    device: torch.device,
    teachers: Sequence[nn.Module] = (),
    *,
    compiled: bool = True,
    graph: bool = True,
    batch: int = BATCH,
    pair_batch: int = PAIR_BATCH,
) -> list[dict[str, Any]]:
    """Train the jobs at once for as many epochs as the budget allows, and return each one's network and figures.

    Jobs of the same seed share their data and their teachers' lengths.
    """
    begin = time.perf_counter()
    streams = {job.seed: data_of(job, mnist, device, batch, pair_batch) for job in jobs}
    chunks = {seed: data().buffers() for seed, data in streams.items()}
    targets: dict[int, Tensor | None] = {seed: _targets(teachers, chunk) for seed, chunk in chunks.items()}
    steps = next(iter(streams.values())).steps
    most = box.epochs * steps
    learners = [
        Learner(partial(CapsNet, _config(job)), total_loss, job.seed, job.settings, most, device, compiled=compiled)
        for job in jobs
    ]
    for job, learner in zip(jobs, learners, strict=True):
        learner.prepare(chunks[job.seed], targets[job.seed], graph=graph)
    _say(f"prepared in {time.perf_counter() - begin:.1f} s")
    epochs = _epochs_that_fit(learners, streams, chunks, teachers, box, steps, begin)
    for learner in learners:
        learner.restart(epochs * steps)
    started = time.perf_counter()
    curves: list[list[float]] = [[] for _ in jobs]
    for epoch in range(epochs):
        for seed, data in streams.items():
            fresh = data()
            chunks[seed].fill(fresh)
            lengths_there, made = targets[seed], _targets(teachers, fresh)
            if lengths_there is not None and made is not None:
                lengths_there.copy_(made)
        for learner in learners:
            learner.loss.zero_()
        learn(learners, steps, device)
        for curve, learner in zip(curves, learners, strict=True):
            curve.append(round(float(learner.loss) / steps, 5))
        if epoch % max(1, epochs // 10) == 0 or epoch == epochs - 1:
            took = time.perf_counter() - started
            _say(f"epoch {epoch + 1} of {epochs}: {[curve[-1] for curve in curves]} {took:.0f} s")
    seconds = time.perf_counter() - started
    return [
        _finished(job, learner, mnist, curve, epochs, steps, seconds, device)
        for job, learner, curve in zip(jobs, learners, curves, strict=True)
    ]


def _config(job: Job) -> CapsNetConfig:
    return replace(CONFIGS[job.config], image_size=PAIR_CANVAS) if job.dataset == PAIRS else CONFIGS[job.config]


def _targets(teachers: Sequence[nn.Module], chunk: Chunk) -> Tensor | None:
    if not teachers:
        return None
    steps, batch = chunk.images.shape[:2]
    return mean_lengths(list(teachers), chunk.images.flatten(0, 1)).reshape(steps, batch, -1)


def _epochs_that_fit(
    learners: Sequence[Learner[CapsNet]],
    streams: dict[int, Digits | Pairs],
    chunks: dict[int, Chunk],
    teachers: Sequence[nn.Module],
    box: Box,
    steps: int,
    begin: float,
) -> int:
    """Return the epochs that fit into the rest of the budget, from the time of some steps and of one epoch's data."""
    device = learners[0].device
    count = min(PROBE_STEPS, steps)
    start = time.perf_counter()
    for _ in range(count):
        for learner in learners:
            learner.step()
    wait(device)
    learning = (time.perf_counter() - start) / count * steps
    start = time.perf_counter()
    for data in streams.values():
        _targets(teachers, data())
    wait(device)
    making = time.perf_counter() - start
    left = box.seconds - (time.perf_counter() - begin)
    epochs = max(1, min(box.epochs, int(0.94 * left / (learning + making))))
    _say(f"an epoch learns {learning:.2f} s and makes data {making:.2f} s: {epochs} epochs in {left:.0f} s")
    return epochs


def _finished(
    job: Job,
    learner: Learner[CapsNet],
    mnist: Dataset,
    curve: list[float],
    epochs: int,
    steps: int,
    seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    model = learner.averaged()
    pairs = job.dataset == PAIRS
    tests = generate(PAIRS, mnist) if pairs else mnist
    images, labels = tests.test_images, tests.test_labels
    # A quick network is evaluated on the CPU, like a certificate, so that both counts are the same.
    probabilities, _ = predict(model if pairs else model.cpu(), images, 1000)
    mistakes = wrong(probabilities, labels).nonzero().flatten().tolist()
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_images": len(mnist.train_images),
        "epochs": epochs,
        "steps": epochs * steps,
        "images_seen": epochs * steps * learner.batch,
        "test_errors": len(mistakes),
        "test_images": len(labels),
        "test_mistakes": mistakes,
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": str(torch.__version__),
        "commit": commit(),
        "curve": curve,
    }
    _say(f"{job.name}: {len(mistakes)} of {len(labels)} wrong, {100 * len(mistakes) / len(labels):.3f} %")
    return {"job": job, "model": model, "figures": figures, "labels": mnist.labels, "batch": learner.batch}


def write(result: dict[str, Any], folder: Path) -> None:
    """Write a network's checkpoint with its recipe, and its figures beside it."""
    job: Job = result["job"]
    model, figures = result["model"], result["figures"]
    state = {name: value.detach().contiguous().cpu() for name, value in model.state_dict().items()}
    recipe = {
        **asdict(job.settings),
        "seed": job.seed,
        "epochs": figures["epochs"],
        "batch_size": result["batch"],
        "max_shift": job.distortion.shift,
        **{name: value for name, value in asdict(job.distortion).items() if name != "shift"},
        "none": job.none and job.dataset != PAIRS,  # pairs are trained without images of none of the classes
        "held_out": 0,
        "precision": "bf16-mixed",
    }
    told = {name: value for name, value in figures.items() if name != "curve"}
    folder.mkdir(parents=True, exist_ok=True)
    save(Checkpoint(model.config, job.dataset, result["labels"], recipe, told, state), folder / f"{job.name}.pt")
    line = {"name": job.name, "config": job.config, "dataset": job.dataset, "recipe": recipe, **figures}
    (folder / f"{job.name}.json").write_text(json.dumps(line))


def jobs_of(phase: str, seeds: Sequence[int], config: str, recipe: Recipe) -> list[Job]:
    """Return the jobs of each phase. The students also learn from the teachers.

    config: of the teachers. recipe: of single digits.
    """
    paper = Hyperparameters(learning_rate=1e-3, weight_decay=0.0, warmup_share=0.02, ema_decay=0.999)
    student = replace(recipe.settings, distil=1.0)
    match phase:
        case "teachers":
            return [Job(f"{config}-{seed}", config, seed, recipe.settings, MNIST, recipe.distortion) for seed in seeds]
        case _ if phase in STUDENTS:
            return [
                Job(f"{name}-distilled-{seed}", name, seed, student, MNIST, recipe.distortion)
                for seed in (10 * seed for seed in seeds)
                for name in STUDENTS[phase]
            ]
        case "pairs":
            return [
                Job(f"pairs-{seed}", "pairs", seed, Hyperparameters(warmup_share=0.02), PAIRS) for seed in seeds[:1]
            ]
        case "paper":
            return [
                Job(f"{name}-{seeds[0]}", name, seeds[0], paper, distortion=Distortion(shift=2.0), none=False)
                for name in PAPER
            ]
    raise ValueError(f"phase: {phase!r}; expected one of {', '.join(PHASES)}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.training", allow_abbrev=False)
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--config", choices=TEACHERS, help="of the teachers (default: accurate)")
    parser.add_argument("--recipe", choices=RECIPES, default="plain", help="of single digits (default: plain)")
    parser.add_argument("--seconds", type=float, required=True, help="time to train in, preparation included")
    parser.add_argument("--epochs", type=int, default=100, help="at most (default: 100); for pairs, chunks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints")
    add_file_flags(parser)
    parser.add_argument("--eager", action="store_true", help="neither compile nor record the step")
    parser.add_argument("--no-graph", action="store_true", help="compile, but do not record the step")
    parser.add_argument("--limit", type=int, help="train and test on the first N images alone, to try the command out")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--pair-batch", type=int, default=PAIR_BATCH)
    options = parser.parse_args(arguments)
    if options.config and options.phase not in ("teachers", *STUDENTS):
        parser.error(f"--config: the networks of the phase {options.phase} are fixed")
    if options.limit is not None and options.limit < options.batch:
        parser.error(f"--limit: {options.limit}; expected at least {options.batch}, the images of a batch")
    config = options.config or "accurate"
    device = training_device()
    torch.backends.cudnn.allow_tf32 = False  # the test is judged in single precision
    mnist = load_or_exit("mnist", options)
    if options.limit:
        mnist = replace(
            mnist,
            train_images=mnist.train_images[: options.limit],
            train_labels=mnist.train_labels[: options.limit],
            test_images=mnist.test_images[: options.limit],
            test_labels=mnist.test_labels[: options.limit],
        )
    teachers: list[nn.Module] = []
    if options.phase in STUDENTS:
        files = [options.out / f"{config}-{seed}.pt" for seed in options.seeds]
        try:
            teachers = [on_device(load(file).model(), device) for file in files]
        except CheckpointError as error:
            parser.error(f"a teacher: {error}")
    results = run(
        jobs_of(options.phase, options.seeds, config, RECIPES[options.recipe]),
        mnist,
        Box(options.seconds, options.epochs),
        device,
        teachers,
        compiled=not options.eager,
        graph=not (options.eager or options.no_graph),
        batch=options.batch,
        pair_batch=options.pair_batch,
    )
    command = shlex.join(
        ["python", "-m", "benchmarks.gpu.training", *(sys.argv[1:] if arguments is None else arguments)]
    )
    for result in results:
        result["figures"]["command"] = command
        write(result, options.out)
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
