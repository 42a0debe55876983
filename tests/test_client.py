"""Tests of the command-line client, as a person and as a program uses it."""

import contextlib
import fcntl
import json
import os
import shlex
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.client.__main__ import main
from serving.client.sources import FORMAT_NAMES
from tests.conftest import DATA, ROOT, Running
from tests.fake_server import FakeServer, answer, numbered

SEVEN = str(DATA / "seven.png")
IDX = str(DATA / "t10k-images-idx3-ubyte.gz")


def test_a_png_gets_ten_bars_and_the_winning_pose(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([SEVEN, "--address", running.address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{SEVEN}: 7"
    first = lines.index("  lengths:") + 1  # a model with a calibration has a verdict before
    bars = [line.count("█") for line in lines[first : first + 10]]
    assert max(bars) == bars[7] > 25
    assert lines[first + 10].strip() == "pose of 7:"
    assert len(" ".join(lines[first + 11 :]).split()) == 16


def test_json_has_probabilities_and_poses_of_all_classes(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([IDX, "--limit", "70", "--json", "--address", running.address]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 70
    assert answers[69]["image"] == f"{IDX}[69]"
    assert "".join(answer["label"] for answer in answers[:8]) == "72104149"
    assert set(answers[0]["probabilities"]) == set("0123456789")
    assert len(answers[0]["poses"]["7"]) == 16


def test_a_bad_file_is_reported_and_the_others_are_answered_in_order(
    running: Running, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.png"
    text.write_text("no image")
    labels = DATA / "t10k-labels-idx1-ubyte.gz"
    missing = tmp_path / "missing.png"
    files = [str(missing), SEVEN, str(text), str(labels), SEVEN]
    assert main([*files, "--json", "--address", running.address]) == 1
    captured = capsys.readouterr()
    assert [json.loads(line)["label"] for line in captured.out.splitlines()] == ["7", "7"]
    assert captured.err.splitlines() == [
        f"{missing}: No such file or directory",
        f"{text}: 8 bytes that are neither a PNG nor a JPEG file",
        f"{labels}: an IDX file of labels or single values; expected one of images",
    ]


@pytest.mark.parametrize("encoding", ["utf-8:strict", "cp1252"])
def test_a_name_that_the_output_cannot_show_is_escaped_and_the_others_are_answered(
    running: Running, tmp_path: Path, encoding: str
) -> None:
    names = [os.fsencode(tmp_path) + name for name in (b"/one.png", b"/caf\xe9.png", "/数字.png".encode(), b"/two.png")]
    for name in names:
        Path(os.fsdecode(name)).write_bytes(Path(SEVEN).read_bytes())
    command = [sys.executable, "-m", "serving.client", "--address", running.address, *map(os.fsdecode, names)]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    result = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment, timeout=60, check=False)
    assert (result.returncode, result.stdout.count(b".png: 7")) == (0, 4), result.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_output_that_is_closed_is_no_fault(running: Running, closed: str) -> None:
    command = shlex.join([sys.executable, "-m", "serving.client", "--address", running.address, SEVEN])
    result = subprocess.run(
        f"{command} {closed}", shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert ("seven.png: 7" in result.stdout) == (not closed.startswith(">"))


@pytest.mark.parametrize("limit", ["0", "-3", "many"])
def test_a_limit_that_is_no_number_of_images_is_refused(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([SEVEN, f"--limit={limit}"])
    assert "expected a whole number above 0" in capsys.readouterr().err


def test_a_missing_server_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([SEVEN, "--address", "127.0.0.1:1"]) == 1
    assert "127.0.0.1:1: no server answers there" in capsys.readouterr().err


def test_a_path_that_is_no_image_file_is_reported(
    running: Running, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    empty, folder = tmp_path / "empty.png", tmp_path / "folder"
    empty.touch()
    folder.mkdir()
    pattern = str(tmp_path / "*.gif")
    assert main([str(folder), str(empty), pattern, "--address", running.address]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith(f"{folder}: a folder without images (.png, .jpg, ")
    assert errors[1:] == [f"{empty}: 0 bytes; expected an image: {FORMAT_NAMES}", f"{pattern}: no file matches"]


def test_wrong_options_are_reported_in_one_line(
    running: Running, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    for arguments, text in (
        (["--address", running.address, "--model", "other"], "'other'"),
        (["--address", "example.org:1", "--token-file", str(token)], "token: would go unencrypted to example.org:1"),
        (["--address", running.address, "--ca-file", "/missing.pem"], "tls: /missing.pem: No such file or directory"),
        (["--address", running.address, "--tls", "--key-file", "key.pem"], "--cert-file and --key-file: one without"),
        (["--address", running.address, "--timeout", "0.0001"], "127.0.0.1"),
    ):
        assert main([SEVEN, *arguments]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert text in line
    with pytest.raises(SystemExit, match="2"):
        main([SEVEN, "--timeout", "0"])
    assert "expected seconds above 0" in capsys.readouterr().err


def test_the_token_goes_from_its_file_to_the_server(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    token, image = tmp_path / "token", tmp_path / "image-idx3-ubyte"
    token.write_text("secret\n")
    image.write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 2]) + numbered(9).tobytes())
    with FakeServer() as server:
        assert main([str(image), "--json", "--address", server.address, "--token-file", str(token)]) == 0
        assert server.metadata["authorization"] == "Bearer secret"
    assert json.loads(capsys.readouterr().out)["poses"]["a"] == [9, 0]


class _Terminal:
    """The client as a process, with a terminal for its standard error."""

    def __init__(self, output: Path, *arguments: str) -> None:
        self._reader, writer = os.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        with output.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serving.client", *arguments], cwd=ROOT, stdout=file, stderr=writer
            )
        os.close(writer)
        self.shown = ""

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def wait_for(self, text: str) -> None:
        while text not in self.shown:
            self.shown += os.read(self._reader, 4096).decode()

    def end(self) -> int:
        """Return the exit status, after all output was read into ``shown``."""
        with contextlib.suppress(OSError):  # Linux reports a closed other side in this way
            while more := os.read(self._reader, 4096):
                self.shown += more.decode()
        os.close(self._reader)
        return self._process.wait(20)


def test_a_terminal_shows_progress_until_an_interrupt(tmp_path: Path) -> None:
    output = tmp_path / "answers"
    with FakeServer() as server:
        server.shape = (1, 28, 28)

        def stream(requests: Iterator[pb.ClassifyStreamRequest], context: Any) -> Iterator[pb.ClassifyStreamResponse]:
            for one in requests:
                server.stopping.wait(0.02)  # the whole stream would take minutes, so no interrupt is too late
                blank = pb.ClassifyRequest(images=[pb.Image(pixels=b"")] * len(one.request.images))
                yield pb.ClassifyStreamResponse(id=one.id, response=answer(blank))

        server.stream = stream
        terminal = _Terminal(output, IDX, SEVEN, "--json", "--address", server.address)
        terminal.wait_for("/10001 [")
        terminal.interrupt()
        assert terminal.end() == 130
    assert terminal.shown.endswith("interrupted\r\n")
    assert "Traceback" not in terminal.shown
    assert 0 < len(output.read_text().splitlines()) < 10_001


def test_a_terminal_shows_no_progress_of_a_quick_run(running: Running, tmp_path: Path) -> None:
    terminal = _Terminal(tmp_path / "answers", SEVEN, "--address", running.address)
    assert (terminal.end(), terminal.shown) == (0, "")
