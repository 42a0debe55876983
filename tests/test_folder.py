"""Tests of a folder of images of any kind: read, trained on, exported and served without a change of code."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms

from export.__main__ import main as export
from serving.client.__main__ import main as client
from serving.files.images import to_pixels
from tests.conftest import Running
from training.__main__ import main as train
from training.checkpoint import load
from training.data.datasets import load_folder
from training.data.sources import DatasetError
from training.data.specs import NONE
from training.loss import presence_loss

COLOURS = {"blue": (40, 60, 220), "green": (30, 200, 60), "red": (230, 40, 30)}


def _save(path: Path, size: tuple[int, int] = (20, 20), colour: object = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)  # type: ignore[arg-type]
    return path


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Three classes of plain images, each in several sizes and shades."""
    for name, colour in COLOURS.items():
        for index in range(20):
            shade = tuple(max(0, part - 2 * index) for part in colour)
            _save(tmp_path / "colours" / name / f"{index:02}.png", (20 + index, 24), shade)
    return tmp_path / "colours"


def test_a_folder_of_three_colours_trains_exports_and_serves(
    colours: Path,
    tmp_path: Path,
    start: Callable[..., Running],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("export.verify._MIN_TIMED_SECONDS", 0.0)
    run, models = tmp_path / "run", tmp_path / "models"
    flags = ["--data", str(colours), "--out", str(run), "--image-size", "20", "--epochs", "12", "--batch-size", "8"]
    small = ["--conv-channels", "16", "--primary-types", "2", "--decoder-widths", "16"]
    assert train([*flags, *small, "--ema-decay", "0.5", "--augment", "none"]) == 0
    assert export([str(run / "capsnet.pt"), str(models)]) == 1
    assert "trained on folder:colours; give it with --data FOLDER" in capsys.readouterr().err
    assert export([str(run / "capsnet.pt"), str(models), "--data", str(colours)]) == 0

    served = start(models=str(models))
    assert served.model.artifact.name == "capsnet-colours"
    assert served.model.artifact.image_shape == (3, 20, 20)
    files = [str(_save(tmp_path / f"{name}.png", (31, 17), colour)) for name, colour in COLOURS.items()]
    assert client([*files, "--resize", "--address", served.address]) == 0
    answers = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(tmp_path))]
    assert answers == [f"{file}: {name}" for file, name in zip(files, COLOURS, strict=True)]
    assert client([files[0], "--address", served.address]) == 1
    assert "a PNG image of 31 x 17 pixels; expected 20 x 20" in capsys.readouterr().err


def test_every_fifth_image_of_a_class_is_for_the_test(colours: Path) -> None:
    dataset = load_folder(colours, progress=False)
    assert dataset.name == "folder:colours"
    assert dataset.labels == ("blue", "green", "red")
    assert dataset.train_images.shape == (48, 3, 32, 32)
    assert dataset.test_labels.bincount().tolist() == [4, 4, 4]
    assert dataset.train_labels.bincount().tolist() == [16, 16, 16]
    assert dataset.test_images[0, :, 0, 0].tolist() == [38, 58, 218]  # of blue/01.png


def test_a_split_that_the_folder_makes_is_kept(tmp_path: Path) -> None:
    _save(tmp_path / "train" / "b" / "1.png")
    _save(tmp_path / "train" / "a" / "1.png")
    _save(tmp_path / "test" / "b" / "1.png")
    dataset = load_folder(tmp_path, progress=False)
    assert (dataset.train_labels.tolist(), dataset.test_labels.tolist()) == ([0, 1], [1])
    _save(tmp_path / "test" / "c" / "1.png")
    with pytest.raises(DatasetError, match="has classes that train has not: c"):
        load_folder(tmp_path)


def test_grey_square_images_keep_their_size_and_channel(tmp_path: Path) -> None:
    for index in range(3):
        _save(tmp_path / "one" / f"{index}.png", (24, 24), 9, "L")
    dataset = load_folder(tmp_path, progress=False)
    assert dataset.train_images.shape == (2, 1, 24, 24)
    assert (dataset.train_images == 9).all()


def test_a_fault_of_a_folder_is_reported_by_name(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nothing: no such folder"):
        load_folder(tmp_path / "nothing")
    with pytest.raises(DatasetError, match="no images to train on"):
        load_folder(tmp_path)
    broken = tmp_path / "class" / "1.png"
    _save(tmp_path / "class" / "0.png")
    Image.effect_noise((20, 20), 50).save(broken)
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DatasetError, match=r"1\.png: a damaged or cut-off image"):
        load_folder(tmp_path, progress=False)
    broken.write_text("no image")
    with pytest.raises(DatasetError, match=r"1\.png: not a readable image"):
        load_folder(tmp_path, progress=False)


def test_a_class_whose_name_no_line_of_a_log_can_hold_is_refused(colours: Path) -> None:
    (colours / "red\ncar").mkdir()
    with pytest.raises(DatasetError, match=r"printable characters alone, unlike 'red\\ncar'"):
        load_folder(colours, progress=False)


def test_folders_without_an_image_are_reported_by_name(colours: Path) -> None:
    (colours / "logs").mkdir()
    (colours / "logs" / "events.txt").write_text("no image")
    (colours / "bird").mkdir()
    with pytest.raises(DatasetError, match="each folder in it is a class, and there is no image in bird, logs;"):
        load_folder(colours, progress=False)


def test_no_progress_is_shown_where_standard_error_is_no_terminal(
    colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_folder(colours, progress=True)

    assert capsys.readouterr().err == ""


def test_hidden_files_and_folders_are_left_out(colours: Path) -> None:
    clean = load_folder(colours, progress=False)
    for hidden in (".git/a.png", "__MACOSX/blue/._00.png", "blue/.thumbnails/0.png"):
        _save(colours / hidden)
    for broken in ("blue/._00.png", "green/.DS_Store", ".DS_Store"):
        (colours / broken).write_bytes(b"\0\5\x16\7 no image")
    dataset = load_folder(colours, progress=False)
    assert dataset.labels == ("blue", "green", "red")
    assert dataset.train_images.equal(clean.train_images)
    assert dataset.notes == clean.notes


def test_images_in_sub_folders_of_a_class_are_read_and_reported(colours: Path) -> None:
    for index in range(3):
        _save(colours / "red" / "more" / "red" / f"{index}.png")
    dataset = load_folder(colours, progress=False)
    assert len(dataset.train_labels) + len(dataset.test_labels) == 63
    assert (dataset.train_labels == 2).sum() + (dataset.test_labels == 2).sum() == 23
    assert any("images in sub-folders of a class are read as that class's: red (3)" in note for note in dataset.notes)


def test_a_folder_one_level_too_high_is_reported(colours: Path) -> None:
    with pytest.raises(DatasetError, match=r"its only folder colours has .*\(blue, green, red\).*give .*colours"):
        load_folder(colours.parent, progress=False)


def test_half_of_a_split_is_reported_and_a_class_may_have_its_name(tmp_path: Path) -> None:
    _save(tmp_path / "half" / "train" / "a" / "1.png")
    with pytest.raises(DatasetError, match="has train alone of train and test"):
        load_folder(tmp_path / "half", progress=False)
    for name in ("bus", "train"):
        for index in range(2):
            _save(tmp_path / "vehicles" / name / f"{index}.png")
    assert load_folder(tmp_path / "vehicles", progress=False).labels == ("bus", "train")


def test_files_that_are_left_out_are_reported(colours: Path) -> None:
    _save(colours / "loose.png")
    (colours / "blue" / "photo.heic").write_bytes(b"ftypheic")
    (colours / "blue" / "README").write_text("no image")
    notes = load_folder(colours, progress=False).notes
    assert any("images that are in no class's folder are left out: 1" in note for note in notes)
    assert any("no images by their ending are left out: .heic (1), no ending (1)" in note for note in notes)


def test_a_split_with_a_third_part_or_loose_images_is_reported(tmp_path: Path) -> None:
    for path in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "valid/a/1.png", "test/loose.png"):
        _save(tmp_path / path)
    notes = load_folder(tmp_path, progress=False).notes
    assert any("beside train and test, left out: valid" in note for note in notes)
    assert any("in no class's folder are left out: 1" in note for note in notes)


def test_classes_of_few_images_are_reported(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for index in range(2):
            _save(tmp_path / name / f"{index}.png")
    (few,) = load_folder(tmp_path, progress=False).notes
    assert "few images to learn from: cat (1), dog (1); a network needs 10 of each class" in few
    assert "measured on 2 test images says little" in few
    for name in ("cat", "dog"):
        for index in range(2, 13):
            _save(tmp_path / name / f"{index:02}.png")
    assert load_folder(tmp_path, progress=False).notes == ()


def test_scaling_is_reported_with_the_sizes_and_lost_proportions(colours: Path, tmp_path: Path) -> None:
    (note,) = load_folder(colours, progress=False).notes
    assert note.endswith(
        "images of 20 x 24 to 39 x 24 pixels are scaled to 32 x 32; what is not square is squashed; "
        "--image-size chooses another size"
    )
    for index in range(13):
        _save(tmp_path / "square" / "one" / f"{index:02}.png", (20, 20))
    assert load_folder(tmp_path / "square", progress=False).notes == ()
    (note,) = load_folder(tmp_path / "square", 24, progress=False).notes
    assert "images of 20 x 20 pixels are scaled to 24 x 24; --image-size" in note


GREY = Image.linear_gradient("L").resize((20, 20))
SIXTEEN_BITS = np.asarray(GREY).astype(np.uint16) * 257
LAB = ImageCms.createProfile("LAB")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "image",
    [
        *(GREY.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")),
        GREY.convert("P").convert("PA"),
        GREY.convert("LA").convert("La"),
        GREY.convert("RGBA").convert("RGBa"),
        ImageCms.profileToProfile(GREY.convert("RGB"), ImageCms.createProfile("sRGB"), LAB, outputMode="LAB"),
        Image.fromarray(SIXTEEN_BITS),
        Image.fromarray(SIXTEEN_BITS.astype(np.int32)),
        Image.frombytes("I;16B", (20, 20), SIXTEEN_BITS.astype(">u2").tobytes()),
    ],
    ids=lambda image: image.mode,
)
def test_an_image_of_any_mode_becomes_the_same_pixels(image: Image.Image, channels: int) -> None:
    pixels = to_pixels(image, channels)
    assert pixels.shape == (channels, 20, 20)
    expected = np.asarray(GREY.convert("1") if image.mode == "1" else GREY).astype(np.float32)
    expected *= 255 if image.mode == "1" else 1
    assert np.abs(pixels.astype(np.float32) - expected).max() <= 6  # LAB and HSV round


@pytest.mark.parametrize("pixels", [np.zeros((20, 20), np.float32), np.full((20, 20), 2**16, np.int32)])
def test_an_image_whose_range_is_not_known_is_reported_by_name(tmp_path: Path, pixels: NDArray[Any]) -> None:
    _save(tmp_path / "class" / "0.png")
    Image.fromarray(pixels).save(tmp_path / "class" / "1.tif")
    with pytest.raises(DatasetError, match=r"1\.tif: .*; save them with 8 or 16 bits each"):
        load_folder(tmp_path, progress=False)


def test_a_network_of_one_class_learns_by_cross_entropy() -> None:
    probabilities = torch.tensor([[0.5], [0.25]], requires_grad=True)
    loss = presence_loss(probabilities, torch.tensor([0, 0]))
    torch.testing.assert_close(loss, torch.tensor((math.log(2) + math.log(4)) / 2))
    loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(probabilities.grad, torch.tensor([[-1.0], [-2.0]]))
    assert presence_loss(torch.zeros(1, 1), torch.tensor([0])).isfinite()


@pytest.mark.parametrize("split", [False, True])
def test_images_in_the_folder_none_show_none_of_the_classes(tmp_path: Path, split: bool) -> None:
    for index in range(10):
        for name, shade in (("cat", 200), ("none", 90), ("owl", 30)):
            part = ("test" if index % 5 == 1 else "train") if split else ""
            _save(tmp_path / part / name / f"{index}.png", (20, 20), shade, "L")
    dataset = load_folder(tmp_path, progress=False)
    assert dataset.labels == ("cat", "owl")
    assert dataset.train_labels.tolist() == [0] * 8 + [1] * 8 + [NONE] * 8
    assert dataset.test_labels.tolist() == [0, 0, 1, 1]
    assert (dataset.train_images[16:] == 90).all()
    assert dataset.none_test_images is not None
    assert dataset.none_test_images.shape == (2, 1, 20, 20)
    assert (dataset.none_test_images == 90).all()


def test_images_of_no_class_alone_are_refused(tmp_path: Path) -> None:
    for index in range(3):
        _save(tmp_path / "none" / f"{index}.png")
    with pytest.raises(DatasetError, match="no images to train on"):
        load_folder(tmp_path, progress=False)


def test_one_class_is_learned_with_images_without_it_and_refused_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    for index in range(30):
        _save(folder / "red" / f"{index}.png", (20, 20), (230 - index, 40, 30))
    flags = ["--data", str(folder), "--out", str(tmp_path / "run"), "--epochs", "4", "--batch-size", "8"]
    small = ["--conv-channels", "16", "--primary-types", "2", "--decoder-widths", "16", "--precision", "32-true"]
    assert train([*flags, *small]) == 1
    error = capsys.readouterr().err
    assert "one class alone, red" in error
    assert "into a folder none" in error
    assert not (tmp_path / "run").exists()

    for index in range(30):
        _save(folder / "none" / f"{index}.png", (20, 20), (40, 60, 220 - index))
    assert train([*flags, *small]) == 0
    assert "of 6 test images of none of the classes, 0 are taken for one" in capsys.readouterr().out
    checkpoint = load(tmp_path / "run" / "capsnet.pt")
    assert checkpoint.labels == ("red",)
    assert checkpoint.figures["test_errors"] == 0
    assert checkpoint.figures["held_out_errors"] == 0
    page = (tmp_path / "run" / "report.md").read_text()
    assert "| test, none of the classes | 6 | 0 | 0.00 %" in page
    assert "Errors by class" not in page
