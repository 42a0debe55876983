"""A process that has imported the packages of the server, and forks itself for each command of the tests.

``python -m tests.fork_server DESCRIPTOR`` serves the socket at that descriptor; tests/forks.py holds the other end. A
fork ends as ``python -m MODULE ARGUMENTS`` would: with the interpreter's own end, or as the command ends its process.
"""

import gc
import io
import json
import os
import runpy
import socket
import sys
import time
from importlib import import_module
from typing import NamedTuple, Self

# What ``python -m serving`` imports. Its own module is left out: runpy warns of a module that is there already.
PRELOADED = (
    "uvloop",
    "serving.artifact",
    "serving.files.images",
    "serving.logs",
    "serving.runtime",
    "serving.server",
    "serving.settings",
)
MAX_MESSAGE_BYTES = 2**17  # the arguments and the environment of a command; a socket takes 200 KiB at once
READY = b"ready"
THREADS = "/proc/self/task"  # a folder for each


class Command(NamedTuple):
    """A command that a fork runs.

    module, arguments: of ``python -m``. environment: all variables. parent: the process id of its parent.
    group: the process group that it joins, 0 for its own, -1 for the parent's. session: True for a session of its own.
    """

    module: str
    arguments: list[str]
    environment: dict[str, str]
    parent: int
    group: int
    session: bool

    def to_bytes(self) -> bytes:
        return json.dumps(self).encode()

    @classmethod
    def from_bytes(cls, message: bytes) -> Self:
        return cls(*json.loads(message))


def serve(channel: socket.socket) -> Command | None:
    """Fork a process for each command that comes. Return it in the fork, and None when the other end is closed.

    Each message brings the command's standard input, output and error. Its answer is the process's id.
    """
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, MAX_MESSAGE_BYTES, 3)
        if not message:
            return None
        assert len(os.listdir(THREADS)) == 1, "a fork would have none of the other threads"
        command = Command.from_bytes(message)
        middle = os.fork()
        if not middle:
            if not (child := os.fork()):
                channel.close()
                _become(command, descriptors)
                return command
            channel.send(str(child).encode())
            os._exit(0)  # the process that asked takes its place as the child's parent
        os.waitpid(middle, 0)
        channel.send(READY)
        for descriptor in descriptors:
            os.close(descriptor)


def _become(command: Command, descriptors: list[int]) -> None:
    """Give this process the streams, the group, the environment and the arguments of a command."""
    for number, (name, descriptor) in enumerate(zip(("stdin", "stdout", "stderr"), descriptors, strict=True)):
        os.dup2(descriptor, number)
        os.close(descriptor)
        stream = _opened(number, getattr(sys, name))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if command.session:
        os.setsid()
    if command.group >= 0:
        os.setpgid(0, command.group)
    while os.getppid() != command.parent:  # until the process in the middle has ended
        time.sleep(0.0005)
    os.environ.clear()
    os.environ.update(command.environment)
    sys.argv[1:] = command.arguments
    sys.orig_argv[:] = [sys.executable, "-m", command.module, *command.arguments]


def _opened(number: int, old: io.TextIOWrapper) -> io.TextIOWrapper:
    """Open a standard stream as Python did for the fork server, which had another file there."""
    raw = io.FileIO(number, "rb" if old.readable() else "wb", closefd=False)
    raw.name = old.name
    buffer = io.BufferedReader(raw) if old.readable() else raw if old.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer, old.encoding, old.errors, line_buffering=old.line_buffering, write_through=old.write_through
    )


def main() -> Command | None:
    """Import what commands need, tell the other end, and serve it."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # as the server does, before it imports gRPC
    for module in PRELOADED:
        import_module(module)
    import_module("serving.runtime").onnxruntime()
    gc.collect()
    gc.freeze()  # so that the pages of these objects stay shared
    channel.send(str(len(os.listdir(THREADS))).encode())
    return serve(channel)


if __name__ == "__main__" and (command := main()):
    runpy.run_module(command.module, run_name="__main__", alter_sys=True)
