"""Tests of many images on the command line: where they come from, the table, the summary and the scores."""

import base64
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from serving.client.__main__ import main
from serving.client.scores import TrueLabels
from tests.conftest import DATA, Running

SEVEN = DATA / "seven.png"
IDX = str(DATA / "t10k-images-idx3-ubyte.gz")
LABELS = str(DATA / "t10k-labels-idx1-ubyte.gz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder 7 with three images, one of them in a folder 8, and with files to be left out."""
    result = tmp_path_factory.mktemp("images")
    for name in ("7/a.png", "7/8/b.PNG", "7/c.png", "7/.hidden.png", "7/._a.png", "__MACOSX/7/a.png", ".git/d.png"):
        (result / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SEVEN, result / name)
    (result / "7" / "notes.txt").write_text("no image")
    return result


def _names(text: str) -> list[str]:
    return [json.loads(line)["image"] for line in text.splitlines()]


def test_folders_and_patterns_stand_for_their_images_in_order(
    running: Running, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert main([str(folder), str(folder / "7" / "?.png"), "--json", "--address", running.address]) == 0
    expected = ["7/8/b.PNG", "7/a.png", "7/c.png", "7/a.png", "7/c.png"]
    assert _names(capsys.readouterr().out) == [str(folder / name) for name in expected]
    assert main([str(folder / "**" / "b.*"), "--json", "--address", running.address]) == 0
    assert _names(capsys.readouterr().out) == [str(folder / "7/8/b.PNG")]


def test_a_name_with_the_characters_of_a_pattern_is_a_file_first(
    running: Running, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copy(SEVEN, tmp_path / "a[1].png")
    assert main([str(tmp_path / "a[1].png"), "--json", "--address", running.address]) == 0
    assert _names(capsys.readouterr().out) == [str(tmp_path / "a[1].png")]


@pytest.mark.parametrize(("data", "count"), [(SEVEN.read_bytes(), 1), (Path(IDX).read_bytes(), 3)])
def test_a_file_on_the_standard_input_is_read(
    running: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: bytes, count: int
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(["-", "--json", "--limit", "3", "--address", running.address]) == 0
    names = _names(capsys.readouterr().out)
    assert (len(names), names[0].startswith("standard input")) == (count, True)


@pytest.mark.parametrize("stream", [io.TextIOWrapper(io.BytesIO(b"")), None])
def test_an_empty_or_closed_standard_input_is_told(
    running: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stream: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", stream)
    assert main(["-", "--address", running.address]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(("standard input: 0 bytes; expected", "standard input: it is closed"))


def test_many_images_get_a_line_each_and_a_summary_with_scores(
    running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([IDX, "--limit", "300", "--labels", LABELS, "--address", running.address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["image", "label", "confidence", "verdict", "true", "label"]
    assert [line.split()[1] for line in lines[1:9]] == list("72104149")
    assert max(map(len, lines[:301])) <= 110
    assert lines[301].startswith("300 images in ")
    right = next(line for line in lines if line.startswith("  right: "))
    wrong = sum(line.endswith("  wrong") for line in lines[1:301])
    assert right == f"  right: {300 - wrong} of 300 ({(300 - wrong) / 3:.2f} %)"
    assert 0 < wrong < 10
    assert lines[-1].startswith("  most errors: ")


def test_a_few_images_keep_their_bars_and_have_no_summary(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(SEVEN)] * 4 + ["--address", running.address]) == 0
    text = capsys.readouterr().out
    assert (text.count("lengths:"), " images in " in text) == (4, False)
    assert main([str(SEVEN)] * 5 + ["--address", running.address]) == 0
    text = capsys.readouterr().out
    assert (text.count("lengths:"), "5 images in " in text, text.count("7 ")) == (0, True, 6)


def test_a_summary_counts_what_has_no_answer(
    running: Running, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = [str(SEVEN)] * 6 + [str(tmp_path / "none.png"), "data:,", str(SEVEN)]
    assert main([*names, "--address", running.address]) == 1
    assert "9 images in " in (text := capsys.readouterr().out)
    assert ", 2 without an answer" in text


def test_many_images_without_an_answer_have_a_summary(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(SEVEN.parent / "handwritten"), "--address", running.address]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("20 images in ") and captured.out.endswith(" s, 20 without an answer\n")
    assert len(captured.err.splitlines()) == 20


def test_labels_are_found_by_folder_by_name_and_in_order(
    running: Running, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    by_name, in_order = tmp_path / "labels.csv", tmp_path / "labels.txt"
    by_name.write_text("\ufeffa.png,7\r\n" + f"{folder / '7/8/b.PNG'},7\nother.png,1\n", "utf-8")
    in_order.write_text("8\n7\n\n7\n")
    for source, expected in (
        ("folders", [False, True, True]),
        (by_name, [True, True]),
        (in_order, [False, True, True]),
    ):
        assert main([str(folder), "--json", "--labels", str(source), "--address", running.address]) == 0
        captured = capsys.readouterr()
        answers = [json.loads(line) for line in captured.out.splitlines()]
        assert [answer["is_right"] for answer in answers if "is_right" in answer] == expected
        assert f"  right: {sum(expected)} of {len(expected)} (" in captured.err
    assert "  most errors: 8 taken for 7 (1)" in captured.err


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a,b,c\n", "expected LABEL or NAME,LABEL in each line"),
        (b"7\na.png,7\n", "expected LABEL or NAME,LABEL in each line"),
        (b"", "expected LABEL or NAME,LABEL in each line"),
        (b"\xff\xfe\0", "is neither text nor IDX"),
        (Path(IDX).read_bytes(), "has 3 dimensions; expected an IDX file of labels"),
        (b"\x1f\x8bjunk", "corrupt gzip stream"),
    ],
    ids=["columns", "mixed", "empty", "binary", "images", "damaged"],
)
def test_labels_that_are_none_are_told_before_a_call(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, text: str
) -> None:
    (tmp_path / "labels").write_bytes(content)
    assert main([str(SEVEN), "--labels", str(tmp_path / "labels"), "--address", "127.0.0.1:1"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert text in line


def test_a_file_of_labels_that_is_not_there_is_told_with_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(SEVEN), "--labels", "folder", "--address", "127.0.0.1:1"]) == 1
    expected = "--labels: folder: No such file or directory; expected a file, or the word folders"
    assert expected in capsys.readouterr().err


def test_what_is_no_path_is_told_in_one_short_line(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["https://example.org/7.png", base64.b64encode(SEVEN.read_bytes() * 30).decode(), "x" * 5000]
    assert main([*given, "--address", running.address]) == 1
    url, text, name = capsys.readouterr().err.splitlines()
    assert "a URL; expected a path, or - to read the file from the standard input" in url
    assert " characters of base64; expected a path, or -" in text
    assert name.endswith("...: File name too long")
    assert max(map(len, (url, text, name))) < 300


def test_labels_are_for_classifications_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(SEVEN), "--labels", "folders", "--explain"])
    assert "--labels: with --explain or --reconstruct" in capsys.readouterr().err
    assert TrueLabels({}, ["7"]).of("a", Path("a"), 1) is None


def test_a_name_is_printed_without_the_characters_that_a_terminal_obeys(
    running: Running, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = [tmp_path / "a\x1b[2J.png", tmp_path / "b\nc.png", tmp_path / "d\r\u202eg.png"]
    for name in names:
        shutil.copy(SEVEN, name)
    assert main([*map(str, names), str(tmp_path / "e\x07.png"), "--address", running.address]) == 1
    captured = capsys.readouterr()
    assert not {"\x1b", "\r", "\u202e", "\x07"} & set(captured.out + captured.err)
    shown = [line.removeprefix(f"{tmp_path}/") for line in captured.out.splitlines() if line.endswith(": 7")]
    assert shown == [r"a\x1b[2J.png: 7", r"b\nc.png: 7", r"d\r\u202eg.png: 7"]
    assert captured.err.endswith("e\\x07.png: No such file or directory\n")
    assert main([str(names[1]), "--json", "--address", running.address]) == 0
    assert _names(capsys.readouterr().out) == [str(names[1])]


def test_a_dark_digit_on_paper_is_no_digit_until_it_is_prepared(
    running: Running, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with Image.open(SEVEN) as image:
        Image.eval(image.convert("L"), lambda value: 255 - value).save(tmp_path / "paper.png")
    assert main([str(tmp_path / "paper.png"), "--address", running.address]) == 0
    captured = capsys.readouterr()
    assert "verdict: NONE_OF_THESE" in captured.out
    assert captured.err.startswith("try --preprocess auto for images that differ")
    assert main([str(tmp_path / "paper.png"), "--preprocess", "auto", "--address", running.address]) == 0
    captured = capsys.readouterr()
    assert ("paper.png: 7\n" in captured.out, captured.err) == (True, "")


def test_an_image_of_another_size_is_told_of_the_options(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    photo = next((DATA / "handwritten").glob("*.jpg"))
    assert main([str(photo), "--address", running.address]) == 1
    assert "(--resize scales it, --preprocess auto finds the object in it)" in capsys.readouterr().err
