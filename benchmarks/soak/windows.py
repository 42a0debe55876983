"""The samples of a server under a soak, by windows of time, and the judgement that it stays as it was."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.load import LoadError

#: The share of the windows, from the first, that is not judged: the server still takes its memory.
WARM_SHARE = 1 / 3
#: The largest growth of the memory over the judged windows, as a share of it.
MAX_MEMORY_GROWTH = 0.05
#: The most by which the peak of the later half may exceed that of the earlier one in a soak of less than SHORT_SECONDS.
#: It has few windows, and memory rises and falls by half between them: it falls when a model is unloaded.
MAX_SHORT_PEAK_GROWTH = 0.25
SHORT_SECONDS = 600.0
#: The most open files and threads by which the later half of the judged windows may exceed the earlier one.
MAX_MORE_FILES = 10
MAX_MORE_THREADS = 4
#: The most by which p99 may have grown from the earlier half of the judged windows to the later one, where it rises
#: from window to window: other programs make it jump, but not rise steadily. In a short soak they may do that, too.
MAX_P99_RATIO = 1.5
MAX_SHORT_P99_RATIO = 5.0
MIN_RANK_CORRELATION = 0.5


@dataclass(frozen=True)
class Process:
    """The state of a process: resident memory in MiB, open files, and threads."""

    memory_mib: float
    files: int
    threads: int


def process_state(pid: int) -> Process:
    """Return the state of a process. Raises LoadError if it has ended."""
    try:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return Process(int(status["VmRSS"].split()[0]) / 1024, files, int(status["Threads"]))
    except (OSError, KeyError) as error:
        raise LoadError("the server's process has ended") from error


@dataclass
class Window:
    """The calls and states of some seconds.

    at: seconds from the soak's begin to the window's end. outcomes: the number of calls by outcome. latencies_ms: of
    the right answers to single images. states: one a second. changes: by kind, how many have been made so far.
    """

    at: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)
    states: list[Process] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)

    @property
    def p99_ms(self) -> float:
        return float(np.percentile(self.latencies_ms, 99)) if self.latencies_ms else float("nan")

    @property
    def p50_ms(self) -> float:
        return float(np.percentile(self.latencies_ms, 50)) if self.latencies_ms else float("nan")

    @property
    def memory_mib(self) -> float:
        return median(state.memory_mib for state in self.states)

    @property
    def peak_memory_mib(self) -> float:
        return max(state.memory_mib for state in self.states)

    @property
    def files(self) -> int:
        return max(state.files for state in self.states)

    @property
    def threads(self) -> int:
        return max(state.threads for state in self.states)

    def row(self) -> dict[str, Any]:
        """Return the figures of the window by column."""
        outcomes = {name: self.outcomes[name] for name in OUTCOMES}
        return {
            "at_s": f"{self.at:.0f}", "calls": sum(self.outcomes.values()), **outcomes,
            "p50_ms": f"{self.p50_ms:.4g}", "p99_ms": f"{self.p99_ms:.4g}", "memory_mib": f"{self.memory_mib:.5g}",
            "files": self.files, "threads": self.threads, **{name: self.changes[name] for name in CHANGES},
        }  # fmt: skip


#: The outcomes of a call: the right answer, the refusal that it must get, cancelled by its client, past its deadline,
#: hung up in the middle, a wrong answer, or something else.
RIGHT, REFUSED, CANCELLED, LATE, HUNG_UP, WRONG, UNEXPECTED = OUTCOMES = (
    "right", "refused", "cancelled", "late", "hung_up", "wrong", "unexpected",
)  # fmt: skip
SWAPS, UNLOADS, TOKEN_RELOADS, RENEWALS = CHANGES = ("swaps", "unloads", "token_reloads", "renewals")


def faults(windows: Sequence[Window], seconds: float) -> list[str]:
    """Return what is wrong with a soak of these windows, in words; nothing if all is right.

    seconds: the length of the soak.
    """
    found = [
        f"{count} calls: {name}"
        for name in (WRONG, UNEXPECTED)
        if (count := sum(window.outcomes[name] for window in windows))
    ]
    if not sum(window.outcomes[RIGHT] for window in windows):
        found.append("no right answer")
    judged = windows[int(len(windows) * WARM_SHARE) :]
    half = len(judged) // 2
    if half < 1:
        return [*found, "too few windows to judge"]
    earlier, later = judged[:half], judged[half:]
    if seconds < SHORT_SECONDS:
        peaks = [window.peak_memory_mib for window in windows]
        growth = max(peaks[len(peaks) // 2 :]) / max(peaks[: len(peaks) // 2]) - 1
        max_growth, max_ratio = MAX_SHORT_PEAK_GROWTH, MAX_SHORT_P99_RATIO
    else:
        growth = slope([window.memory_mib for window in judged]) * (len(judged) - 1) / judged[0].memory_mib
        max_growth, max_ratio = MAX_MEMORY_GROWTH, MAX_P99_RATIO
    if growth > max_growth:
        found.append(f"memory grew by {growth:.1%}; expected at most {max_growth:.0%}")
    for name, most in (("files", MAX_MORE_FILES), ("threads", MAX_MORE_THREADS)):
        before, after = (median(getattr(window, name) for window in half) for half in (earlier, later))
        if after > before + most:
            found.append(f"{name} rose from {before:g} to {after:g}; expected at most {most} more")
    p99 = [window.p99_ms for window in judged]
    ratio = median(p99[half:]) / median(p99[:half])
    if ratio > max_ratio and rank_correlation(p99) > MIN_RANK_CORRELATION:
        found.append(f"p99 rose to the {ratio:.2g}-fold; expected at most the {max_ratio:g}-fold")
    return found


def slope(values: Sequence[float]) -> float:
    """Return the median slope between all pairs of values (the estimator of Theil and Sen), a step."""
    steps = [
        (later - values[first]) / (second - first)
        for first in range(len(values))
        for second, later in enumerate(values[first + 1 :], first + 1)
    ]
    return median(steps) if steps else 0.0


def rank_correlation(values: Sequence[float]) -> float:
    """Return Spearman's correlation of values with their order: 1 if they rise from each to the next."""
    if len(values) < 3:
        return 0.0
    ranks = np.argsort(np.argsort(values))
    return float(np.corrcoef(np.arange(len(values)), ranks)[0, 1])
