"""The command-line client, as a person and as a program meets it."""

import json
from pathlib import Path

import pytest

from serving.client import main
from tests.conftest import DATA, Running

SEVEN = str(DATA / "seven.png")
IDX = str(DATA / "t10k-images-idx3-ubyte.gz")


def test_a_png_gets_ten_bars_and_the_winning_pose(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([SEVEN, "--address", running.address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{SEVEN}: 7"
    bars = [line.count("█") for line in lines[1:11]]
    assert max(bars) == bars[7] > 25
    assert lines[11].strip() == "pose of 7:"
    assert len(" ".join(lines[12:]).split()) == 16


def test_json_has_probabilities_and_poses_of_all_classes(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([IDX, "--limit", "70", "--json", "--address", running.address]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 70
    assert answers[69]["image"] == f"{IDX}[69]"
    assert "".join(answer["label"] for answer in answers[:8]) == "72104149"
    assert set(answers[0]["probabilities"]) == set("0123456789")
    assert len(answers[0]["poses"]["7"]) == 16


def test_a_bad_file_is_told_and_the_others_are_answered_in_order(
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
        f"{text}: images[0].encoded: 8 bytes that are neither a PNG nor a JPEG file",
        f"{labels}: an IDX file of labels or single values; expected one of images",
    ]


@pytest.mark.parametrize("limit", ["0", "-3", "many"])
def test_a_limit_that_is_no_number_of_images_is_refused(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([SEVEN, f"--limit={limit}"])
    assert "expected a whole number above 0" in capsys.readouterr().err


def test_no_server_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([SEVEN, "--address", "127.0.0.1:1"]) == 1
    assert "127.0.0.1:1: no server answers there" in capsys.readouterr().err
