"""Tests of the soak: what it judges, what it takes for inner text, and broken requests in small numbers."""

import csv
import os
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest

from benchmarks.soak import __main__ as command
from benchmarks.soak.breaker import break_all
from benchmarks.soak.broken import BROKEN, NEVER_OK, NOT_ANSWERED_BY_GRPCIO, Maker, last_words
from benchmarks.soak.calls import KINDS
from benchmarks.soak.inner_text import inner_text
from benchmarks.soak.right_answers import Numbers, difference
from benchmarks.soak.served import Held, held, left_over
from benchmarks.soak.windows import RIGHT, WRONG, Process, Window, faults, rank_correlation, slope
from serving.transport import frames
from tests.conftest import Running
from tests.raw_client import wait_for


def windows(count: int = 30, **changes: Any) -> list[Window]:
    """Return windows of a soak. changes: by field of a state, or p99, a function of the window's number."""
    usual: dict[str, Any] = {"memory_mib": lambda n: 100, "files": lambda n: 30, "threads": lambda n: 9}
    made = []
    for number in range(count):
        state = {name: (changes.get(name) or value)(number) for name, value in usual.items()}
        p99 = changes.get("p99", lambda n: 10.0)(number)
        outcomes = Counter({RIGHT: 100} | changes.get("outcomes", {}))
        made.append(Window(60.0 * (number + 1), outcomes, [p99] * 100, [Process(**state)] * 3))
    return made


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, ""),
        ({"memory_mib": lambda n: 60 + min(40, 10 * n)}, ""),
        ({"memory_mib": lambda n: 100 + n % 2 * 15}, ""),
        ({"memory_mib": lambda n: 100 + n}, "memory grew by 17.3%"),
        ({"files": lambda n: 30 + 2 * n}, "files rose from 59 to 79"),
        ({"threads": lambda n: 9 + n / 2}, "threads rose"),
        ({"p99": lambda n: 10.0 + n}, ""),
        ({"p99": lambda n: 10.0 + 3 * n}, "p99 rose to the 1.6-fold"),
        ({"p99": lambda n: 200.0 if n in (20, 22) else 10.0}, ""),
        ({"outcomes": {WRONG: 1}}, "30 calls: wrong"),
        ({"outcomes": {RIGHT: 0}}, "no right answer"),
    ],
)
def test_a_soak_is_judged_by_what_rises(changes: dict[str, Any], word: str) -> None:
    found = faults(windows(**changes), 1800.0)
    if word:
        assert len(found) == 1
        assert word in found[0]
    else:
        assert found == []


def test_a_short_soak_is_judged_more_mildly() -> None:
    rising = windows(12, memory_mib=lambda n: 100 + n, p99=lambda n: 10.0 + 3 * n)
    assert faults(rising, 60.0) == []
    assert [text.split()[0] for text in faults(rising, 1800.0)] == ["memory"]


def test_a_short_soak_is_judged_by_its_peaks_of_memory() -> None:
    falling_twice = [135, 154, 166, 188, 190, 218, 128, 139, 172, 181, 200, 218]
    assert faults(windows(12, memory_mib=lambda n: falling_twice[n]), 60.0) == []
    assert faults(windows(12, memory_mib=lambda n: 100 + 8 * n), 60.0) == ["memory grew by 34.3%; expected at most 25%"]


def test_a_slope_and_a_rank_correlation_are_not_moved_by_single_values() -> None:
    assert slope([1.0, 2.0, 3.0, 90.0, 5.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 3.0, 4.0]) == pytest.approx(1.0)
    assert rank_correlation([4.0, 3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert rank_correlation([1.0, 2.0]) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "Traceback (most recent call last)", "KeyError: 'x'", "File server.py", "/usr/lib/x", "<class 'int'>",
        "cannot open model.onnx", "Exception", "at 0x7f3a5c001230",
    ],
)  # fmt: skip
def test_inner_text_is_found(text: str) -> None:
    assert inner_text(f"request: {text}")


@pytest.mark.parametrize(
    "text",
    [
        "images[0].pixels: 3 bytes; expected 784 (1 x 28 x 28, one byte a pixel)", "Method not found!",
        "model_name: '../../etc/passwd' is not served; there is: digits version 1",
        "request: 12 bytes that are not a capsnet.v1.ClassifyRequest", "",
    ],
)  # fmt: skip
def test_texts_for_clients_are_no_inner_text(text: str) -> None:
    assert not inner_text(text)


def test_an_answer_that_differs_by_more_than_rounding_is_wrong() -> None:
    right = Numbers(np.eye(3, dtype=np.float32), np.zeros((3, 3, 2), np.float32), ("a", "b", "c"))
    assert difference(right, [1, 0], right.probabilities[[1, 0]], right.poses[:2]) == ""
    assert difference(right, [0, 1], right.probabilities[[1, 0]], right.poses[:2]).startswith("probabilities that")
    assert difference(right, [0], right.probabilities[:2], right.poses[:1]).startswith("probabilities of the shape")
    assert difference(right, [0], right.probabilities[:1], right.poses[:1] + np.nan).startswith("poses that differ")


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_requests_are_of_whole_frames(kind: str) -> None:
    maker = Maker(random.Random(0), ())
    for _ in range(20):
        sent = BROKEN[kind](maker, 1)
        while sent:
            high, low, *_ = frames.HEAD.unpack_from(sent)
            end = frames.HEAD.size + (high << 8 | low)
            assert len(sent) >= end
            sent = sent[end:]
    assert last_words(maker)


@pytest.mark.server
def test_broken_requests_get_errors_without_inner_text_and_leave_nothing_behind(
    running_on_each: Running, transport: str
) -> None:
    optional = NOT_ANSWERED_BY_GRPCIO if transport == "grpcio" else ()
    result = break_all(running_on_each.server.port, 600, Maker(random.Random(7), ()), optional)
    assert result.faults == []
    assert result.requests == sum(result.kinds.values()) == 600
    assert len(result.kinds) > len(NEVER_OK)
    wait_for(lambda: running_on_each.server._edge.under_way == 0)


def test_a_soak_is_printed_written_and_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def finished(transport: str, **changes: Any) -> Any:
        return SimpleNamespace(
            client=SimpleNamespace(server=SimpleNamespace(transport=transport)),
            windows=windows(12, **changes),
            faults=[],
            outcomes_by_kind={kind.name: Counter({RIGHT: 3}) for kind in KINDS},
        )

    soaks = [finished("native"), finished("grpcio")]
    monkeypatch.setattr(command, "soak", lambda *_: soaks)
    out, picture = tmp_path / "soak.csv", tmp_path / "soak.png"
    assert command.main(["--minutes", "1", "--out", str(out), "--plot", str(picture)]) == 0
    with out.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["transport"] for row in rows] == ["native"] * 12 + ["grpcio"] * 12
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "no fault" in capsys.readouterr().out
    soaks[1] = finished("grpcio", outcomes={WRONG: 2})
    assert command.main(["--minutes", "1"]) == 1
    assert "FAULT: 24 calls: wrong" in capsys.readouterr().out


def test_a_run_of_broken_requests_fails_on_any_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "hostile.csv"
    found: list[str] = []
    monkeypatch.setattr(command, "hostile", lambda transport, count: ({"transport": transport, "n": count}, found))
    assert command.main(["--hostile", "9", "--out", str(out)]) == 0
    assert out.read_text() == "transport,n\nnative,9\ngrpcio,9\n"
    found.append("an answer")
    assert command.main(["--hostile", "9"]) == 1


def test_what_a_server_holds_is_compared_with_what_it_held_before() -> None:
    before = Held({"calls": 3.0}, connections=2, files=20)
    assert Held({"calls": 0.0}, connections=2, files=22).beyond(before) == {}
    assert Held({"calls": 1.0}, connections=5, files=40).beyond(before) == {"calls": 1, "connections": 3, "files": 20}


@pytest.mark.server
def test_every_amount_that_must_be_left_is_a_metric_of_the_server(running_on_each: Running) -> None:
    def fetch(_: object) -> bytes:
        with urlopen(running_on_each.metrics_url) as response:
            page: bytes = response.read()
        return page

    server: Any = SimpleNamespace(
        served=SimpleNamespace(fetch=fetch, process=SimpleNamespace(pid=os.getpid())), token=""
    )
    assert left_over(server, held(server)) == {}
