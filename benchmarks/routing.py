"""``python -m benchmarks.routing``: time and peak memory of dynamic routing, side by side in several variants.

Axes, as in training.model: B images, I primary capsules, D their dimension, J classes, E digit capsule dimension.
"""

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.autograd.profiler import profile
from tqdm import tqdm

from training.model import CONFIGS, CapsNetConfig, Routing, route, squash, votes
from training.provenance import provenance

TOLERANCE = 1e-5  # greatest difference from the plain loop's result, relative to its greatest value
SAMPLE_SECONDS = 0.02  # a sample repeats its pass for about this long
BLOCKS = 8
_PAPER = Routing()
PASSES = ("forward", "forward+backward")

Route = Callable[[Tensor, Tensor, int], Tensor]  # (B, I, D), (I, D, J, E), iterations -> (B, J, E)


def plain(u: Tensor, weight: Tensor, iterations: int) -> Tensor:
    """Procedure 1 of the paper, line by line; only the last update of the logits, which nothing reads, is left out.

    u: (B, I, D); weight: (I, D, J, E). Returns (B, J, E).
    """
    u_hat = torch.einsum("bid,idje->bije", u, weight)
    b = u.new_zeros(u_hat.shape[:3])  # (B, I, J)
    for iteration in range(iterations):
        c = b.softmax(dim=2)
        v = squash(torch.einsum("bij,bije->bje", c, u_hat))
        if iteration < iterations - 1:
            b = b + torch.einsum("bije,bje->bij", u_hat, v)
    return v


def plain_contiguous(u: Tensor, weight: Tensor, iterations: int) -> Tensor:
    """The plain loop on votes that lie in memory as (B, J, I, E), the order in which its matrix products read them.

    Shapes as in ``plain``, whose votes lie as (I, B, J, E): all that it reads of them for one pose is far apart.
    """
    u_hat = votes(u, weight)
    b = u.new_zeros(u_hat.shape[:3])  # (B, J, I)
    for iteration in range(iterations):
        c = b.softmax(dim=1)
        v = squash((c.unsqueeze(2) @ u_hat).squeeze(2))
        if iteration < iterations - 1:
            b = b + (u_hat @ v.unsqueeze(-1)).squeeze(-1)
    return v


def broadcast(u: Tensor, weight: Tensor, iterations: int) -> Tensor:
    """The plain loop with products broadcast over five axes, which copies the weights for each image.

    Shapes as in ``plain``.
    """
    u_hat = u[:, :, None, None, :] @ weight.permute(0, 2, 1, 3)[None]  # (B, I, J, 1, E)
    b = u.new_zeros((*u_hat.shape[:3], 1, 1))
    for iteration in range(iterations):
        c = b.softmax(dim=2)
        v = squash((c * u_hat).sum(dim=1, keepdim=True))  # (B, 1, J, 1, E)
        if iteration < iterations - 1:
            b = b + (u_hat * v).sum(dim=-1, keepdim=True)
    return v[:, 0, :, 0]


def ours(u: Tensor, weight: Tensor, iterations: int, choices: Routing = _PAPER, blocks: int = 1) -> Tensor:
    """Return the poses, (B, J, E), by the network's own routing; blocks as ``training.model.route`` takes them."""
    return route(u, weight, replace(choices, iterations=iterations), blocks=blocks)[0]


@dataclass(frozen=True)
class Variant:
    """One way to compute routing. The others are compared with the first of VARIANTS."""

    name: str
    routing: Route
    compiled: bool = False


VARIANTS = (
    Variant("plain", plain),
    Variant("plain-compiled", plain, compiled=True),
    Variant("plain-contiguous", plain_contiguous),
    Variant("ours", ours),
    Variant("ours-compiled", ours, compiled=True),
    Variant("ours-votes-not-stored", partial(ours, blocks=BLOCKS)),
    Variant("broadcast", broadcast),
)


class DifferentResult(Exception):
    """A variant computes another result than the plain loop."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of routing. u: (B, I, D); weight: (I, D, J, E); upstream, the poses' gradient: (B, J, E)."""

    u: Tensor
    weight: Tensor
    upstream: Tensor
    iterations: int

    @classmethod
    def random(cls, config: CapsNetConfig, batch: int, device: torch.device) -> "Inputs":
        """Capsules as the network squashes them and weights spread as its own, the same in every run."""
        generator = torch.Generator().manual_seed(0)
        normal = partial(torch.randn, generator=generator)
        u = squash(normal(batch, config.primary_capsules, config.primary_dim))
        weight = 0.1 * normal(config.primary_capsules, config.primary_dim, config.classes, config.digit_dim)
        upstream = normal(batch, config.classes, config.digit_dim)
        return cls(
            u.to(device).requires_grad_(),
            weight.to(device).requires_grad_(),
            upstream.to(device),
            config.routing_iterations,
        )

    def forward(self, routing: Route) -> tuple[Tensor, ...]:
        """Return the poses, computed without gradients as for classification."""
        with torch.no_grad():
            return (routing(self.u, self.weight, self.iterations),)

    def forward_backward(self, routing: Route) -> tuple[Tensor, ...]:
        """Return the poses and the gradients of u and weight."""
        poses = routing(self.u, self.weight, self.iterations)
        return (poses.detach(), *torch.autograd.grad(poses, (self.u, self.weight), self.upstream))


@dataclass(frozen=True)
class Row:
    """A line of the CSV: the case, its figures, and the machine. Figures are None for a case that was not run.

    ms and its quartiles: milliseconds a pass. ratio_to_plain: the time divided by that of the plain loop in the same
    round, the median of all rounds. peak_mib: the peak bytes that PyTorch held for tensors during a pass, above the
    bytes that it held before.
    """

    config: str
    batch: int
    direction: str
    variant: str
    ms: float | None
    ms_quartile_1: float | None
    ms_quartile_3: float | None
    ratio_to_plain: float | None
    peak_mib: float | None
    rounds: int
    not_run: str
    device: str
    threads: int
    torch: str
    commit: str


def check(name: str, results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Raise DifferentResult if a result differs by more than TOLERANCE from the expected one, relative to its scale.

    Both are the poses (B, J, E), or these and the gradients (B, I, D) and (I, D, J, E).
    """
    for what, result, wanted in zip(("poses", "gradient of u", "gradient of weight"), results, expected, strict=False):
        if result.shape != wanted.shape:
            raise DifferentResult(f"{name}: {what}: shape {tuple(result.shape)}; expected {tuple(wanted.shape)}")
        difference = ((result - wanted).abs().max() / wanted.abs().max()).item()
        if not difference <= TOLERANCE:
            raise DifferentResult(
                f"{name}: {what} differ from the plain loop's by {difference:.1e} of their scale; "
                f"expected {TOLERANCE:.0e} or less"
            )


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the peak bytes that PyTorch held for tensors during a step, above the bytes that it held before.

    What a library allocates past PyTorch's allocator, as for packing a matrix, is not counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(profile_memory=True, use_kineto=False) as profiler:
        step()
    assert profiler.kineto_results is not None
    changes = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def seconds(step: Callable[[], object], repetitions: int, device: torch.device) -> float:
    """Return the wall time of a step in seconds: the mean of several repetitions in a row."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repetitions):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repetitions


def compiler_fault(device: torch.device) -> str:
    """Return the reason why torch.compile does not work here, or "" if it works."""
    try:
        # Cached results of an earlier run would hide that the compiler is missing now.
        with torch._inductor.config.patch(force_disable_caches=True):
            torch.compile(torch.square)(torch.ones(2, device=device))
    except BackendCompilerFailed as error:
        if type(error.inner_exception).__name__ == "InvalidCxxCompiler":
            return "no C++ compiler"
        return f"torch.compile fails: {str(error).splitlines()[0]}"
    return ""


def measure(
    inputs: Inputs, routings: dict[str, Route], rounds: int, device: torch.device, bar: "tqdm[Any]"
) -> dict[tuple[str, str], dict[str, float]]:
    """Return the figures of each (pass, variant), by their names in Row. Ratios refer to the first variant.

    Raises DifferentResult before anything is measured.
    """
    steps = {
        (direction, name): partial(run, routing)
        for direction, run in zip(PASSES, (inputs.forward, inputs.forward_backward), strict=True)
        for name, routing in routings.items()
    }
    reference = next(iter(routings))
    expected = inputs.forward_backward(routings[reference])
    repetitions = {}
    peaks = {}
    for key, step in steps.items():
        bar.set_postfix_str(f"checking {key[1]}")
        check(key[1], step(), expected)
        peaks[key] = peak_bytes(step, device)
        repetitions[key] = max(1, round(SAMPLE_SECONDS / seconds(step, 1, device)))
        bar.update()
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            bar.set_postfix_str(f"timing {key[1]}", refresh=False)
            samples[key].append(seconds(step, repetitions[key], device))
            bar.update()
    figures = {}
    for (direction, name), values in samples.items():
        baseline = samples[direction, reference]
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if rounds > 1 else [values[0]] * 3
        figures[direction, name] = {
            "ms": 1e3 * median,
            "ms_quartile_1": 1e3 * low,
            "ms_quartile_3": 1e3 * high,
            "ratio_to_plain": statistics.median(a / b for a, b in zip(values, baseline, strict=True)),
            "peak_mib": peaks[direction, name] / 2**20,
        }
    return figures


def table(rows: list[Row]) -> str:
    """Return the rows of one config and batch as a text table."""
    lines = [f"\n{rows[0].config}, batch {rows[0].batch}"]
    for direction in PASSES:
        lines.append(f"  {direction:<24}{'ms':>10}{'quartiles':>22}{'x plain':>9}{'peak MiB':>10}")
        for row in rows:
            if row.direction != direction:
                continue
            if row.not_run:
                lines.append(f"    {row.variant:<22}  not run: {row.not_run}")
            else:
                spread = f"{row.ms_quartile_1:.2f} - {row.ms_quartile_3:.2f}"
                lines.append(
                    f"    {row.variant:<22}{row.ms:>10.2f}{spread:>22}{row.ratio_to_plain:>9.2f}{row.peak_mib:>10.2f}"
                )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.routing",
        description="Time and peak memory of dynamic routing, side by side in several variants.",
    )
    result.add_argument("--configs", nargs="+", choices=CONFIGS, default=["paper", "compact"], help="network shapes")
    result.add_argument("--batches", nargs="+", type=int, default=[1, 32, 128], metavar="N", help="images in a batch")
    result.add_argument("--rounds", type=int, default=15, metavar="N", help="samples of each figure (default: 15)")
    result.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's)")
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    result.add_argument("--no-compile", action="store_true", help="leave the variants under torch.compile out")
    result.add_argument("--out", type=Path, metavar="CSV", help="write the figures to this file too")
    return result


def main(arguments: list[str] | None = None) -> int:
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # otherwise the profiler writes two lines a pass into the progress bar
    command = parser()
    options = command.parse_args(arguments)
    if min(*options.batches, options.rounds, 1 if options.threads is None else options.threads) < 1:
        command.error("--batches, --rounds and --threads take numbers of 1 or more")
    if options.device == "cuda" and not torch.cuda.is_available():
        command.error("--device cuda: PyTorch finds no CUDA device here")
    device = torch.device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    origin = provenance(device)
    variants = [variant for variant in VARIANTS if not (variant.compiled and options.no_compile)]
    fault = compiler_fault(device) if any(variant.compiled for variant in variants) else ""
    running = [variant for variant in variants if not (variant.compiled and fault)]
    rows: list[Row] = []
    cases = [(name, batch) for name in options.configs for batch in options.batches]
    with tqdm(total=len(cases) * len(PASSES) * len(running) * (1 + options.rounds), unit="sample") as bar:
        for config, batch in cases:
            bar.set_description(f"{config}, batch {batch}")
            torch.compiler.reset()  # PyTorch stops compiling new shapes at a limit
            routings: dict[str, Route] = {
                variant.name: torch.compile(variant.routing, fullgraph=True, dynamic=False)
                if variant.compiled
                else variant.routing
                for variant in running
            }
            try:
                figures = measure(Inputs.random(CONFIGS[config], batch, device), routings, options.rounds, device, bar)
            except DifferentResult as error:
                print(f"{config}, batch {batch}: {error}", file=sys.stderr)
                return 1
            nothing = dict.fromkeys(("ms", "ms_quartile_1", "ms_quartile_3", "ratio_to_plain", "peak_mib"))
            added = [
                Row(
                    config=config,
                    batch=batch,
                    direction=direction,
                    variant=variant.name,
                    **figures.get((direction, variant.name), nothing),
                    rounds=options.rounds,
                    not_run="" if variant in running else fault,
                    device=origin["device"],
                    threads=torch.get_num_threads(),
                    torch=origin["torch"],
                    commit=origin["commit"],
                )
                for direction in PASSES
                for variant in variants
            ]
            rows += added
            tqdm.write(table(added))
    if options.out is not None:
        write(rows, options.out)
    return 0


def write(rows: list[Row], file: Path) -> None:
    """Write the rows as CSV, figures with five significant digits. Figures of a case that was not run stay empty."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        names = [field.name for field in fields(Row)]
        writer.writerow(["pass" if name == "direction" else name for name in names])
        for row in rows:
            values = (getattr(row, name) for name in names)
            writer.writerow([f"{value:.5g}" if isinstance(value, float) else value for value in values])


if __name__ == "__main__":
    sys.exit(main())
