"""Tests of the fork server of the tests: a fork is as a process that was started."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import forks
from tests.conftest import ROOT

TOLD = [sys.executable, "-m", "tests.told"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> forks.ForkServer:
    """The fork server, for the command of these tests too."""
    monkeypatch.setattr(forks, "FORKED", {*forks.FORKED, "tests.told"})
    if forks.fork_server().threads > 1:
        pytest.skip("numpy has started threads; `make test` sets OMP_NUM_THREADS=1")
    return forks.fork_server()


def both(*arguments: str, number: int = 0, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a started and a forked process tell, and how they end, by a signal if there is a number."""
    found = []
    for start in (subprocess.Popen, forks.Popen):
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        # Without a given environment a started process also has what libraries have set without Python's knowledge.
        with start([*TOLD, *arguments], cwd=ROOT, env=dict(os.environ), text=True, **pipes, **options) as process:
            assert process.stdin and process.stdout and process.stderr
            process.stdin.write("some input")
            process.stdin.close()
            told = json.loads(process.stdout.readline())
            if number:
                process.send_signal(number)
            told |= {"rest": process.stdout.read(), "errors": process.stderr.read(), "status": process.wait(30)}
        found.append(told)
        assert told["parent"] == os.getpid()
    return found[0], found[1]


def test_a_fork_is_given_what_a_started_process_is_given(server: forks.ForkServer, monkeypatch: Any) -> None:
    monkeypatch.setenv("CAPSNET_MODEL", "caf\udce9")
    started, forked = both("a status", "--flag", "caf\udce9 数字", "")
    assert forked == started
    assert forked["environment"]["CAPSNET_MODEL"] == "caf\udce9"
    assert forked["arguments"][2:] == ["--flag", "caf\udce9 数字", ""]
    assert (forked["input"], forked["threads"], forked["status"]) == ("some input", 1, 3)


@pytest.mark.parametrize("option", ["start_new_session", "process_group"])
def test_a_fork_has_its_own_group_where_that_is_asked_for(server: forks.ForkServer, option: str) -> None:
    started, forked = both("a status", **{option: {"process_group": 0, "start_new_session": True}[option]})
    assert forked == started
    assert forked["group"] == "its own"


@pytest.mark.parametrize("ending", ["a status", "words", "at once", "after a thread", "nothing else"])
def test_a_fork_ends_as_a_started_process_does(server: forks.ForkServer, ending: str) -> None:
    started, forked = both(ending)
    assert forked == started


def test_the_error_of_a_fork_ends_with_the_same_lines(server: forks.ForkServer) -> None:
    started, forked = both("an error")
    last = [told.pop("errors").splitlines()[-4:] for told in (started, forked)]
    assert last[0] == last[1] and last[0][-1] == "ValueError: an error"
    assert forked == started


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGHUP])
def test_a_fork_dies_of_a_signal_as_a_started_process_does(server: forks.ForkServer, number: signal.Signals) -> None:
    started, forked = both("a signal", number=number)
    last = [told.pop("errors").splitlines()[-1:] for told in (started, forked)]
    assert last[0] == last[1]
    assert forked == started
    assert forked["status"] == -number


def test_a_fork_that_ends_too_late_is_killed(server: forks.ForkServer) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        forks.run([*TOLD, "a signal"], stdin=subprocess.DEVNULL, cwd=ROOT, timeout=0.5)
    result = forks.run([*TOLD, "words"], stdin=subprocess.DEVNULL, cwd=ROOT)
    assert (result.returncode, result.stderr) == (1, "words\n")


def is_forked(process: "subprocess.Popen[str]") -> bool:
    """Return True for a process whose command line is the fork server's."""
    return b"fork_server" in Path(f"/proc/{process.pid}/cmdline").read_bytes()


def test_what_a_fork_cannot_do_is_started(server: forks.ForkServer, tmp_path: Any) -> None:
    unlike: list[dict[str, Any]] = [
        {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}},
        {"env": os.environ | {"OMP_NUM_THREADS": "2"}},
        {"env": {}},
        {"preexec_fn": os.getpid},
        {},
    ]
    for options in unlike:
        with forks.Popen(
            [*TOLD, "a signal"], **{"cwd": ROOT, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **options}
        ) as process:
            assert process.stdout and json.loads(process.stdout.readline())
            assert is_forked(process) == (options == {})
            process.kill()
