"""Tests of ``--explain`` and ``--reconstruct`` of the command-line client."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serving.client.__main__ import main
from serving.client.looking import write_new
from tests.calibrated import MNIST, PAIRS, overlapped
from tests.conftest import DATA, Digits, Running
from tests.fake_server import FakeServer

SEVEN = str(DATA / "seven.png")
IDX = str(DATA / "t10k-images-idx3-ubyte.gz")

# A function that runs the command with arguments for a model. It returns the exit status, the output and the errors.
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(calibrated_servers: Callable[[str], Running], capsys: pytest.CaptureFixture[str]) -> Run:
    address = calibrated_servers("native").address

    def command(*arguments: str, model: str = MNIST) -> tuple[int, str, str]:
        code = main([*arguments, "--address", address, "--model", model])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture
def pair(digits: Digits, tmp_path: Path) -> str:
    """The file of a 3 and a 5, one over the other."""
    three, five = (digits.images[np.flatnonzero(digits.labels == label)[0]] for label in (3, 5))
    Image.fromarray(overlapped(three, five)).save(tmp_path / "pair.png")
    return str(tmp_path / "pair.png")


def _pixels(path: Path) -> list[list[int]]:
    with Image.open(path) as image:
        pixels: list[list[int]] = np.asarray(image).tolist()
        return pixels


def test_verdict_and_confidence_stand_above_the_lengths(run: Run, pair: str) -> None:
    code, out, _ = run(SEVEN)
    lines = out.splitlines()
    assert (code, lines[0], lines[2]) == (0, f"{SEVEN}: 7", "  lengths:")
    assert lines[1].startswith("  verdict: OK, confidence 0.9")
    assert any(
        line.startswith(("  verdict: SEVERAL (3, 5), conf", "  verdict: SEVERAL (5, 3), conf"))
        for line in run(pair, model=PAIRS)[1].splitlines()
    )
    numbers = json.loads(run(SEVEN, "--json")[1])
    assert (numbers["verdict"], numbers["present"]) == ("OK", ["7"])
    assert numbers["confidence"] == numbers["confidences"]["7"] > 0.9
    assert "reconstruction_error" not in numbers


def test_an_explanation_is_drawn_and_written(run: Run, tmp_path: Path, digits: Digits) -> None:
    folder = tmp_path / "new" / "folder"
    code, out, err = run(SEVEN, "--explain", "--classes", "7,1", "--out", str(folder))
    lines = out.splitlines()
    assert (code, lines[0]) == (0, f"{SEVEN}: 7")
    assert sum(line.startswith("  largest contributions to ") for line in lines) == 2
    assert any(line.startswith("  entropies of the routing: 1.000 ") for line in lines)
    captions = lines.index("image                         relevance for 7")
    assert lines[captions + 15].rstrip() == "relevance for 1"
    assert "@" in "".join(lines[captions:])
    names = ["seven-image.png", "seven-relevance-7.png", "seven-relevance-1.png"]
    assert err.splitlines() == [f"wrote {folder / name}" for name in names]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert _pixels(folder / names[0]) == digits.images[0].tolist()
    colours = np.array(_pixels(folder / names[1]))
    assert colours.shape == (28 * 8, 28 * 8, 3)
    assert (colours[..., 0] > colours[..., 2] + 100).any(), "no orange"


def test_overlapping_digits_are_drawn_with_their_layers(run: Run, pair: str, tmp_path: Path) -> None:
    code, out, _ = run(pair, "--reconstruct", "--out", str(tmp_path / "out"), model=PAIRS)
    assert code == 0
    for caption in ("drawn 3", "part of 3", "drawn 5", "part of 5", "  reconstruction error: 0.0"):
        assert caption in out
    layers = [np.array(_pixels(tmp_path / "out" / f"pair-layer-{label}.png")) for label in "35"]
    assert np.maximum(*layers).tolist() == _pixels(Path(pair))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"pair-{kind}-{label}.png" for kind in ("reconstruction", "layer") for label in "35"
    }


def test_a_sweep_is_written_as_a_strip_and_its_changes_are_told(run: Run, tmp_path: Path) -> None:
    options = ["--reconstruct", "--sweep", "1:-0.2:0.2:3", "--change", "3:0.1", "--change", "4:-0.1"]
    _, out, err = run(SEVEN, *options, "--out", str(tmp_path))
    assert all(f"drawn 7 {delta}" in out for delta in ("-0.2", "+0", "+0.2"))
    assert err == f"wrote {tmp_path / 'seven-sweep-1-7.png'}\n"
    with Image.open(tmp_path / "seven-sweep-1-7.png") as image:
        assert image.size == (8 * (3 * 28 + 2 * 2), 8 * 28)
    numbers = json.loads(run(SEVEN, *options, "--json")[1])
    pose = numbers["poses"]["7"]
    drawn = numbers["reconstructions"]
    assert [one["delta"] for one in drawn] == pytest.approx([-0.2, 0, 0.2])
    assert drawn[1]["pose"][:5] == pytest.approx([*pose[:3], pose[3] + 0.1, pose[4] - 0.1])
    assert np.array(drawn[0]["image"]).shape == (1, 28, 28)


def test_json_has_the_numbers_of_both(run: Run) -> None:
    code, out, err = run(SEVEN, "--explain", "--reconstruct", "--json")
    numbers = json.loads(out)
    assert (code, err, numbers["label"]) == (0, "", "7")
    [one] = numbers["explanation"]["classes"]
    assert np.array(one["relevance"]).shape == (28, 28)
    assert np.array(one["couplings"]).shape == (3, len(one["contributions"]))
    assert numbers["explanation"]["primary_capsules"]["types"] == 4
    assert 0 < numbers["reconstruction_error"] < 0.05
    assert numbers["reconstructions"][0]["layer"] is None
    assert "files" not in numbers


def test_images_of_an_idx_file_have_their_numbers_in_the_names(run: Run, tmp_path: Path) -> None:
    _, out, err = run(IDX, "--limit", "2", "--reconstruct", "--json", "--out", str(tmp_path))
    paths = [json.loads(line)["files"] for line in out.splitlines()]
    stem = tmp_path / "t10k-images-idx3-ubyte"
    assert paths == [[f"{stem}-0-reconstruction-7.png"], [f"{stem}-1-reconstruction-2.png"]]
    assert err.splitlines() == [f"wrote {path}" for [path] in paths]


def test_a_bad_file_is_told_and_the_others_are_looked_into(run: Run, tmp_path: Path) -> None:
    text, missing = tmp_path / "text.png", tmp_path / "missing.png"
    text.write_text("no image")
    code, out, err = run(str(missing), SEVEN, str(text), SEVEN, "--reconstruct", "--json")
    assert (code, [json.loads(line)["label"] for line in out.splitlines()]) == (1, ["7", "7"])
    assert err.splitlines() == [
        f"{missing}: No such file or directory",
        f"{text}: 8 bytes that are neither a PNG nor a JPEG file",
    ]


def test_a_class_that_the_model_does_not_have_ends_the_run(run: Run) -> None:
    code, out, err = run(SEVEN, SEVEN, "--explain", "--classes", "x")
    assert (code, out) == (1, "")
    assert err == "classes[0]: 'x'; capsnet-mnist has 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n"


def test_an_older_server_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        assert main([SEVEN, "--explain", "--address", server.address]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line == (
            f"{server.address}: the server there lacks this method: it is of another kind, or older than this client "
            "(Method not found!)"
        )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--classes", "7"], "--classes needs --explain or --reconstruct"),
        (["--out", "folder"], "--out needs --explain or --reconstruct"),
        (["--sweep", "1:0:1:3"], "--sweep needs --reconstruct"),
        (["--explain", "--change", "1:0.5"], "--change needs --reconstruct"),
        (["--reconstruct", "--change", "1:1", "--change", "1:2"], "a dimension of [1, 1] stands twice"),
        (["--reconstruct", "--change", "1"], "'1'; expected DIM:DELTA, such as 3:0.1"),
        (["--reconstruct", "--sweep", "1:0:1"], "'1:0:1'; expected DIM:FIRST:LAST:STEPS, such as 3:-0.2:0.2:7"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([SEVEN, *options])
    assert text in capsys.readouterr().err


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    paths = [write_new(tmp_path, "t-shirt/top ü..", content) for content in (b"1", b"2", b"3")]
    assert [path.name for path in paths] == ["t-shirt_top_ü...png", "t-shirt_top_ü..-2.png", "t-shirt_top_ü..-3.png"]
    assert [path.read_bytes() for path in paths] == [b"1", b"2", b"3"]
    assert {path.parent for path in paths} == {tmp_path}
