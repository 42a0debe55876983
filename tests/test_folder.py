"""A folder of images of any kind: read, trained on, exported and served, with no code touched."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from export.__main__ import main as export
from serving.client.__main__ import main as client
from tests.conftest import Running
from training.__main__ import main as train
from training.data.datasets import load_folder
from training.data.sources import DatasetError
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
    colours: Path, tmp_path: Path, start: Callable[..., Running], capsys: pytest.CaptureFixture[str]
) -> None:
    run, models = tmp_path / "run", tmp_path / "models"
    flags = ["--data", str(colours), "--out", str(run), "--image-size", "20", "--epochs", "12", "--batch-size", "8"]
    assert train([*flags, "--ema-decay", "0.5", "--augment", "none"]) == 0
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


def test_what_is_wrong_with_a_folder_is_told_by_name(tmp_path: Path) -> None:
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


def test_a_network_of_one_class_learns_by_cross_entropy() -> None:
    probabilities = torch.tensor([[0.5], [0.25]], requires_grad=True)
    loss = presence_loss(probabilities)
    torch.testing.assert_close(loss, torch.tensor((math.log(2) + math.log(4)) / 2))
    loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(probabilities.grad, torch.tensor([[-1.0], [-2.0]]))
    assert presence_loss(torch.zeros(1, 1)).isfinite()
