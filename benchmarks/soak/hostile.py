"""Broken requests in large numbers beside a client in good faith: whether anything of the server breaks."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.attacks.good_client import Calls, good_client
from benchmarks.attacks.served import Target, target
from benchmarks.figures import origin
from benchmarks.load import LoadError
from benchmarks.soak.breaker import TOKEN_VARIABLE
from benchmarks.soak.served import held, left_over

#: Processes that send broken requests.
_BREAKERS = 2
_DEADLINE_SECONDS = 20.0
_SLICE_SECONDS = 2.0
_MAX_MEMORY_RATIO = 2.0
_ROOT = Path(__file__).parents[2]


def hostile(transport: str, count: int) -> tuple[dict[str, Any], list[str]]:
    """Send ``count`` broken requests to a server of its own. Return the row of figures, and what is wrong, in words.

    Raises LoadError if a client or the server ends early.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        target("tokens", transport, Path(folder)) as server,
        good_client(server, _DEADLINE_SECONDS) as client,
    ):
        client.calls(_SLICE_SECONDS)
        memory, before = server.memory_mib(), held(server)
        begin, good = time.monotonic(), Calls()
        with ThreadPoolExecutor(_BREAKERS) as pool:
            work = [
                pool.submit(_break, server, transport, count // _BREAKERS + (seed < count % _BREAKERS), seed)
                for seed in range(_BREAKERS)
            ]
            while not all(one.done() for one in work):
                _add(good, client.calls(_SLICE_SECONDS))
        seconds = time.monotonic() - begin
        results = [one.result() for one in work]
        left = left_over(server, before)
        after, memory_after = client.calls(_SLICE_SECONDS), server.memory_mib()
        log = server.served.log.read_text(errors="replace")
    outcomes = Counter[str]()
    for result in results:
        outcomes.update(result["outcomes"])
    shown = [text for result in results for text in result["faults"]]
    row = {
        "transport": transport, "requests": sum(result["requests"] for result in results),
        "connections": sum(result["connections"] for result in results), "seconds": f"{seconds:.0f}",
        "faults": sum(result["fault_count"] for result in results), "good_calls": good.made,
        "good_right": good.right, "good_wrong": good.wrong + after.wrong, "good_p99_ms": f"{good.p99_ms:.4g}",
        "memory_mib": f"{memory:.4g}", "after_mib": f"{memory_after:.4g}", "left": _shown(left),
        "tracebacks": log.count("Traceback"), "log_mb": f"{len(log) / 1e6:.3g}",
        "outcomes": ", ".join(f"{number} {name}" for name, number in outcomes.most_common() if number), **origin(),
    }  # fmt: skip
    return row, [*shown, *_wrong(row, good, after)]


def _break(server: Target, transport: str, count: int, seed: int) -> dict[str, Any]:
    """Send broken requests in a process of its own, and return its results."""
    flags = [f"--count={count}", f"--seed={seed}", *(["--grpcio"] if transport == "grpcio" else [])]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak.breaker", str(server.port), *flags],
        cwd=_ROOT, env=os.environ | {TOKEN_VARIABLE: server.token}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise LoadError(f"a client of broken requests has failed: {done.stderr[-1000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _shown(left: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in left.items())


def _wrong(row: dict[str, Any], good: Calls, after: Calls) -> list[str]:
    """Return what is wrong with the figures of a run."""
    limit = _MAX_MEMORY_RATIO * float(row["memory_mib"])
    found = {
        f"{row['faults']} answers that must not be": row["faults"],
        f"{row['good_wrong']} wrong answers beside them": row["good_wrong"],
        "the client in good faith was not served afterwards": after.right < after.made,
        f"the server still holds {row['left']}": row["left"],
        f"{row['after_mib']} MiB afterwards; expected at most {limit:.4g}": float(row["after_mib"]) > limit,
        f"{row['tracebacks']} tracebacks in the log": row["tracebacks"],
        "no call in good faith was answered": not good.right,
    }
    return [text for text, is_wrong in found.items() if is_wrong]


def _add(total: Calls, more: Calls) -> None:
    total.made += more.made
    total.right += more.right
    total.wrong += more.wrong
    total.latencies_ms += more.latencies_ms
    total.failed += more.failed
