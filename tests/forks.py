"""``subprocess.Popen`` and ``subprocess.run`` for ``python -m MODULE``, without the time that its imports take.

The process is a fork of tests/fork_server.py, which each process of tests starts once. It is a child of the tests'
process, as a started one is. Its packages are imported before it has its arguments: a test of the start itself, of its
memory, or of variables that imports read, starts a process in the usual way.
"""

import atexit
import ctypes
import inspect
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, AnyStr

from tests.fork_server import MAX_MESSAGE_BYTES, READY, Command

ROOT = Path(__file__).parent.parent
#: The modules that are forked: the fork server has imported what they need, but for the frameworks of training.
FORKED = frozenset(
    {"benchmarks.load", "benchmarks.without", "export", "serving", "serving.client", "serving.tokens", "training"}
)
#: Variables that no import reads begin so. With another one that differs from the fork server's, no process is forked.
_READ_LATE = ("CAPSNET_", "PYTEST_")
_SIGNATURE = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")  # of standard input, output and error
_PR_SET_CHILD_SUBREAPER = 36


class ForkServer:
    """The process that forks itself, while this object is open."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._lock = threading.Lock()
        self._channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fork_server", str(other.fileno())],
                cwd=ROOT, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        self.threads = int(self._receive())

    def takes(self, environment: Mapping[str, str]) -> bool:
        """Return True if imports with these variables would have been the same."""
        differing = dict(environment.items() ^ self._environment.items())
        return self.threads == 1 and all(name.startswith(_READ_LATE) for name in differing)

    def start(self, command: Command, streams: Sequence[int]) -> int:
        """Fork a process for the command, with these descriptors as its standard streams. Return its id."""
        with self._lock:
            _adopt_orphans(True)
            try:
                socket.send_fds(self._channel, [command.to_bytes()], streams)
                pid = int(self._receive())
                assert self._receive() == READY
            finally:
                _adopt_orphans(False)
        return pid

    def _receive(self) -> bytes:
        message = self._channel.recv(MAX_MESSAGE_BYTES)
        assert message, "the fork server has ended; it says why"
        return message

    def close(self) -> None:
        self._channel.close()
        self._process.wait()


def _adopt_orphans(wanted: bool) -> None:
    """Become the parent of each process below this one whose own parent ends, or leave that to the system."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


@cache
def fork_server() -> ForkServer:
    """Return the fork server of this process, which ends with it."""
    started = ForkServer()
    atexit.register(started.close)
    return started


class Popen(subprocess.Popen[AnyStr]):
    """A process that is forked where that is as good as a start, and otherwise started."""

    def _execute_child(self, *given: Any) -> None:
        asked = _SIGNATURE.bind(self, *given).arguments
        environment = dict(os.environ if asked["env"] is None else asked["env"])
        pipes = [asked[name] for name in _PIPES]
        ends = (pipes[0], pipes[3], pipes[5])  # the process's own
        streams = [number if end == -1 else end for number, end in enumerate(ends)]  # without one it has this process's
        if not _is_plain(asked) or any(map(os.isatty, streams)) or not fork_server().takes(environment):
            super()._execute_child(*given)  # type: ignore[misc]
            return
        _, _, module, *arguments = map(str, asked["args"])
        group, session = asked["process_group"], asked["start_new_session"]
        self.pid = fork_server().start(Command(module, arguments, environment, os.getpid(), group, session), streams)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def _is_plain(asked: Mapping[str, Any]) -> bool:
    """Return True if a process is asked for that runs a forked module in this folder, with nothing unusual."""
    unusual = [asked[name] for name in ("executable", "preexec_fn", "pass_fds", "shell", "gid", "gids", "uid")]
    if any(unusual) or asked["umask"] != -1 or Path(asked["cwd"] or ".").resolve() != ROOT:
        return False
    command = asked["args"]
    return isinstance(command, list) and command[:2] == [sys.executable, "-m"] and command[2] in FORKED


def run(command: list[str], timeout: float = 60, **options: Any) -> subprocess.CompletedProcess[str]:
    """Return how a process ended and what it wrote, as ``subprocess.run`` would.

    timeout: in seconds. options: those of Popen. Raises TimeoutExpired, and kills the process.
    """
    with Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
