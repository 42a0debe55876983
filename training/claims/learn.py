"""Training of many networks: several at once on one GPU, one after the other on a processor.

Each finished network is scored and stored at once, and a stored one is never trained again.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch

from training.claims.images import Images
from training.claims.jobs import PAPER, PLACED, Job, Scale
from training.claims.nets import CapsuleNet, PlainNet, batch_loss, build, parameters
from training.claims.scoring import DivergedError, Points, Sets, score
from training.claims.store import Arrays, Store, round_weights, spec_of
from training.claims.streams import CHUNK_STEPS, Stream, stream
from training.precision import default_precision
from training.provenance import commit, provenance
from training.recorded.chunks import Chunk
from training.recorded.learner import Hyperparameters, Learner, learn

SETTINGS = Hyperparameters(ema_decay=0.999)
PAPER_SETTINGS = replace(SETTINGS, learning_rate=1e-3)  # Adam's usual one, which the paper took too
AT_ONCE_ON_GPU, AT_ONCE_ON_CPU = 18, 1  # networks; on a processor, an interruption then loses one at most
POINTS = 12  # of a training at which the affine set is answered
SPARE_SHARE = 0.05  # of a group's expected time, for its scores

AnyLearner = Learner[CapsuleNet | PlainNet]


@dataclass(frozen=True)
class Workshop:
    """The place of the training: the store, the images on the CPU, the device, and who is told the progress.

    say: is told the progress in words. done: is called after each stored network. deadline: the time of
    ``time.perf_counter`` by which a group must be expected to end to be begun.
    origin: the commit, where git cannot tell it.
    """

    store: Store
    images: Images
    scale: Scale
    device: torch.device
    say: Callable[[str], None] = print
    done: Callable[[], object] = lambda: None
    deadline: float | None = None
    origin: str = ""


def chosen_device() -> torch.device:
    """Return the GPU, or the CPU without one, and set PyTorch up for small networks side by side."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # queues, so that streams do not wait for each other
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # the test is judged in single precision
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(jobs: Iterable[Job], shop: Workshop) -> list[Job]:
    """Train the jobs that are not in the store, in their order.

    Return those that the deadline left out, and those whose networks give scores that are not finite.
    """
    waiting = [job for job in dict.fromkeys(jobs) if not shop.store.finished(job)]
    sets = Sets(shop.images, shop.scale)
    images = shop.images.to(shop.device)
    left: list[Job] = []
    for group in groups(waiting, AT_ONCE_ON_GPU if shop.device.type == "cuda" else AT_ONCE_ON_CPU):
        left += _train_group(group, images, sets, shop)
    return left


def groups(jobs: Sequence[Job], most: int) -> Iterator[list[Job]]:
    """Yield neighbours that train at once: the same kind of images, and equally many steps of equally many images.

    The paper's network trains alone: it fills a GPU, and its dropout draws from the generator that all would share.
    """
    for (_, _, _, alone), alike in groupby(jobs, lambda job: (job.images, job.steps, job.batch, job.kind == PAPER)):
        same, count = list(alike), 1 if alone else most
        for start in range(0, len(same), count):
            yield same[start : start + count]


def _train_group(jobs: Sequence[Job], images: Images, sets: Sets, shop: Workshop) -> list[Job]:
    """Train jobs at once, score and store them; return those that are not stored, all if the deadline is too near."""
    begin = time.perf_counter()
    if shop.deadline is not None and begin > shop.deadline:
        return list(jobs)
    streams: dict[tuple[int, int], Stream] = {(job.seed, job.per_class): stream(job, images) for job in jobs}
    buffers = {key: fresh().buffers() for key, fresh in streams.items()}
    learners = [_learner(job, buffers[job.seed, job.per_class], shop.device) for job in jobs]
    points = [Points(sets) if job.images == PLACED else None for job in jobs]
    steps = jobs[0].steps
    shop.say(f"{len(jobs)} x {jobs[0].name}: prepared in {time.perf_counter() - begin:.1f} s")
    started = time.perf_counter()
    for done in range(0, steps, CHUNK_STEPS):
        if done:
            for key, fresh in streams.items():
                buffers[key].fill(fresh())
        learn(learners, min(CHUNK_STEPS, steps - done), shop.device)
        reached = min(steps, done + CHUNK_STEPS)
        if done == 0 and not _fits(time.perf_counter() - started, steps, shop):
            return list(jobs)
        if reached == steps or reached // max(1, steps // POINTS) > done // max(1, steps // POINTS):
            for point, learner in zip(points, learners, strict=True):
                if point:
                    with suppress(DivergedError):  # the last scores tell it too
                        point.add(reached, _rounded(learner))
            took = time.perf_counter() - started
            shop.say(f"step {reached} of {steps}, {1000 * took / reached / len(jobs):.3g} ms a step of one network")
    seconds = (time.perf_counter() - begin) / len(jobs)
    diverged: list[Job] = []
    for job, learner, point in zip(jobs, learners, points, strict=True):
        net = _rounded(learner)
        try:
            found: dict[str, Arrays] = score(job, net, shop.images, sets)
        except DivergedError as error:
            shop.say(f"{job.name} is not stored: {error}")
            diverged.append(job)
            continue
        if point:
            found["affine"] = point.arrays
        shop.store.write(job, net, found, _figures(job, net, seconds, shop))
        shop.done()
    shop.say(f"{len(jobs) - len(diverged)} networks stored after {time.perf_counter() - begin:.1f} s")
    return diverged


def _learner(job: Job, chunk: Chunk, device: torch.device) -> AnyLearner:
    half = default_precision() == "bf16-mixed"
    make = partial(build, spec_of(job))
    settings = PAPER_SETTINGS if job.kind == PAPER else SETTINGS
    learner = AnyLearner(make, batch_loss, job.seed, settings, job.steps, device, compiled=False, half=half)
    learner.prepare(chunk)
    return learner


def _fits(first_chunk: float, steps: int, shop: Workshop) -> bool:
    """Return True if a group is expected to end before the deadline, from the seconds of its first chunk."""
    if shop.deadline is None:
        return True
    expected = first_chunk * (steps / CHUNK_STEPS) * (1 + SPARE_SHARE)
    left = shop.deadline - time.perf_counter()
    if expected > left:
        shop.say(f"left out: it would take {expected:.0f} s, and {left:.0f} s are left")
    return expected <= left


def _rounded(learner: AnyLearner) -> CapsuleNet | PlainNet:
    net = learner.averaged()
    round_weights(net)
    return net


def _figures(job: Job, net: CapsuleNet | PlainNet, seconds: float, shop: Workshop) -> dict[str, Any]:
    """Return the facts of a trained network; seconds: its share of its group's time."""
    origin = provenance(shop.device)
    return {
        "parameters": parameters(net),
        "seconds": round(seconds, 2),
        "device": origin["device"],
        "torch": origin["torch"],
        "commit": commit() or shop.origin,
        "steps": job.steps,
        "batch": job.batch,
        "seed": job.seed,
    }
