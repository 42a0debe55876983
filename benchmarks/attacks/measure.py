"""The measurement of one attack: before it, beside it, and after it.

The attacker takes processor time from every other process of the machine, whatever the attacked server does. So the
quiet latencies are those of a second client at a second server, which nobody attacks, at the same time on the same
machine. What this control waits for is the machine; what the attacked server's client waits for in addition is the
server's own doing.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.attacks.attacker import BEGUN
from benchmarks.attacks.good_client import Calls, GoodClient
from benchmarks.attacks.link import Attack
from benchmarks.attacks.served import Target, settled
from benchmarks.load import LoadError

#: The most memory that an attack may make the server take, as a multiple of the memory before.
MAX_MEMORY_RATIO = 2.0
#: The largest p99 beside an attack, as a multiple of the quiet one: that of the control at the same time.
MAX_P99_RATIO = 10.0
_ROOT = Path(__file__).parents[2]
_SAMPLE_SECONDS = 0.02
_RETURN_SECONDS = 30.0


@dataclass
class Peak:
    """The largest resident memory of the server during a block, in MiB."""

    mib: float


@dataclass(frozen=True)
class Result:
    """The figures of one attack.

    quiet, beside, after: the good client's calls before, beside and after the attack. control: those of a client of
    another server during the attack. memory_mib, peak_mib,
    memory_after_mib: the server's resident memory before, at most, and after. returned_seconds: the time from the
    attack's end until no call was in flight and the good client was served, or None if that did not come. opened:
    connections of the attacker. sent: its bytes.
    """

    quiet: Calls
    control: Calls
    beside: Calls
    after: Calls
    memory_mib: float
    peak_mib: float
    memory_after_mib: float
    returned_seconds: float | None
    opened: int
    sent: int

    @property
    def memory_ratio(self) -> float:
        return self.peak_mib / self.memory_mib

    @property
    def p99_ratio(self) -> float:
        """The p99 beside the attack, as a multiple of the control's, or of the one before if that was longer."""
        return self.beside.p99_ms / max(self.quiet.p99_ms, self.control.p99_ms)


@contextmanager
def watched_memory(server: Target) -> Iterator[Peak]:
    """Sample the server's memory in a thread until the block ends."""
    peak, ending = Peak(server.memory_mib()), threading.Event()

    def sample() -> None:
        while not ending.wait(_SAMPLE_SECONDS):
            try:
                peak.mib = max(peak.mib, server.memory_mib())
            except LoadError:
                return  # the good client's calls tell it

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        ending.set()
        thread.join()


@contextmanager
def attacking(attack: Attack, port: int, connections: int, seconds: float) -> Iterator["subprocess.Popen[str]"]:
    """Run an attack in a process of its own, which has begun when the block begins. Raises LoadError."""
    module = "benchmarks.attacks.attacker"
    command = [sys.executable, "-m", module, attack.name, str(port), f"--connections={connections}"]
    with subprocess.Popen([*command, f"--seconds={seconds}"], cwd=_ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            if not process.stdout or process.stdout.readline().strip() != BEGUN:
                raise LoadError(f"the attack {attack.name} did not begin")
            yield process
        finally:
            process.kill()


def measure(
    server: Target,
    client: GoodClient,
    control: GoodClient,
    attack: Attack,
    connections: int,
    seconds: float,
    calm_seconds: float,
) -> Result:
    """Return the figures of an attack of some seconds. Raises LoadError if it does not run, or the server ends.

    control: a client of another server of the same kind. calm_seconds: the time of the calls before the attack, and of
    those after it.
    """
    quiet = client.calls(calm_seconds)
    memory = server.memory_mib()
    with watched_memory(server) as peak:
        with attacking(attack, server.port_of(attack.port), connections, seconds) as process:
            with ThreadPoolExecutor(1) as pool:
                elsewhere = pool.submit(control.calls, seconds)
                beside = client.calls(seconds)
            printed = process.communicate()[0]
        if process.returncode:
            raise LoadError(f"the attack {attack.name} failed")
        sent: dict[str, Any] = json.loads(printed)
        after, returned = _return(server, client, calm_seconds)
    return Result(
        quiet,
        elsewhere.result(),
        beside,
        after,
        memory,
        peak.mib,
        server.memory_mib(),
        returned,
        sent["opened"],
        sent["sent"],
    )


def _return(server: Target, client: GoodClient, calm_seconds: float) -> tuple[Calls, float | None]:
    """Wait until the server is as before. Return the last calls, and the seconds or None if that did not come."""
    begin = time.monotonic()
    after = Calls()
    while time.monotonic() - begin < _RETURN_SECONDS:
        quiet = settled(server, _RETURN_SECONDS)
        seconds = time.monotonic() - begin
        after = client.calls(calm_seconds)
        if quiet and after.right == after.made:
            return after, seconds
    return after, None
