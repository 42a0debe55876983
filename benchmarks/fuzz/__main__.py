"""``python -m benchmarks.fuzz``: inputs that coverage guides, by atheris where it is installed, or random changes."""

import argparse
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.fuzz.corpus import TARGETS, kept, mutations
from benchmarks.fuzz.target import Target

#: The most seconds of one input, and the most memory that the inputs of a target may add.
MAX_SECONDS, MAX_ADDED_MIB = 5.0, 256


class Finding(Exception):
    """An input after which an error leaves a target that is not documented, or that takes too much."""

    def __init__(self, target: Target, data: bytes, reason: str) -> None:
        super().__init__(f"{target.name}: {reason}: {data[:200]!r}")
        self.data = data


def check(target: Target, data: bytes) -> None:
    """Run a target on an input. Raises Finding."""
    memory, begin = _memory_mib(), time.process_time()
    try:
        target.run(data)
    except Exception as error:
        raise Finding(target, data, f"{type(error).__name__}: {error}") from error
    if (seconds := time.process_time() - begin) > MAX_SECONDS:
        raise Finding(target, data, f"{seconds:.1f} s")
    if (added := _memory_mib() - memory) > MAX_ADDED_MIB:
        raise Finding(target, data, f"{added:.0f} MiB")


def run_random(target: Target, seconds: float, seed: int) -> int:
    """Run random changes of the kept inputs. Return their number. Raises Finding."""
    end, executions = time.monotonic() + seconds, 0
    for data in mutations(list(kept(target).values()), random.Random(seed)):
        if time.monotonic() >= end:
            break
        check(target, data)
        executions += 1
    return executions


def run_guided(target: Target, seconds: float, folder: Path) -> bool:
    """Run atheris in a process of its own. Return True if it found nothing. folder: for new inputs and findings."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.fuzz.guided", target.name, f"{seconds:.0f}", str(folder)]
    return subprocess.run(command, check=False).returncode == 0


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    command.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="targets (default: all)", metavar="TARGET")
    command.add_argument("--seconds", type=float, default=60.0, help="time for each target (default: 60)")
    command.add_argument("--seed", type=int, default=0, help="of the random changes (default: 0)")
    command.add_argument("--guided", type=Path, metavar="FOLDER", help="use atheris, and put new inputs into FOLDER")
    command.add_argument("--list", action="store_true", help="print the names of the targets")
    options = command.parse_args(arguments)
    if options.list:
        print("\n".join(TARGETS))
        return 0
    targets = [TARGETS[name] for name in options.targets or TARGETS]
    failed = False
    for target in targets:
        if options.guided:
            failed |= not run_guided(target, options.seconds, options.guided / target.name)
            continue
        try:
            executions = run_random(target, options.seconds, options.seed)
            print(f"{target.name}: {executions} inputs, nothing found", flush=True)
        except Finding as finding:
            failed = True
            print(finding, flush=True)
            Path(f"finding-{target.name}").write_bytes(finding.data)
    return 1 if failed else 0


def _memory_mib() -> float:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
