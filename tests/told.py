"""``python -m tests.told ENDING``: print what a process was given, and end in a chosen way. For tests/test_forks.py."""

import atexit
import json
import os
import signal
import sys
import threading
from pathlib import Path


def given() -> dict[str, object]:
    """Return all that a process has from its parent."""
    module = sys.modules["__main__"]
    streams = (sys.stdin, sys.stdout, sys.stderr)
    old = os.umask(0)
    os.umask(old)
    return {
        "arguments": sys.argv,
        "typed": sys.orig_argv,
        "main": [module.__name__, module.__spec__.name if module.__spec__ else None, module.__file__],
        "folder": os.getcwd(),
        "first folder of modules": sys.path[0],
        "environment": dict(os.environ),
        "parent": os.getppid(),
        "group": os.getpgrp() if os.getpgrp() != os.getpid() else "its own",
        "session": os.getsid(0) if os.getsid(0) != os.getpid() else "its own",
        "umask": old,
        "input": sys.stdin.read(),
        "streams": [[one.name, one.fileno(), one.encoding, one.errors, one.line_buffering] for one in streams],
        "same streams": streams == (sys.__stdin__, sys.__stdout__, sys.__stderr__),
        "descriptors": sorted(file.name for file in Path("/proc/self/fd").iterdir()),
        "threads": len(os.listdir("/proc/self/task")),
        "handlers": {one.name: str(signal.getsignal(one)).partition(" at ")[0] for one in signal.Signals},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    }


def end(way: str) -> None:
    """End this process in a way, or by the signal that it waits for."""
    if way == "a status":
        sys.exit(3)
    if way == "words":
        sys.exit("words")
    if way == "at once":
        os._exit(4)
    if way == "an error":
        raise ValueError("an error")
    if way == "after a thread":
        atexit.register(print, "at the exit")
        threading.Timer(0.1, print, ["in a thread"]).start()
    if way == "a signal":
        signal.pause()


if __name__ == "__main__":
    print(json.dumps(given()), flush=True)
    end(sys.argv[1])
