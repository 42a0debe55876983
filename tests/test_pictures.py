"""Tests of the picture of a decoder: its reconstructions, its changes of poses, and the command that draws it."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from training import pictures
from training.checkpoint import Checkpoint, save
from training.data import datasets
from training.data.datasets import Dataset
from training.data.matching import load_matching
from training.data.sources import DatasetError
from training.evaluate import most_probable, predict
from training.model import CapsNet, CapsNetConfig, to_pixels
from training.pictures import (
    OFFSETS,
    PictureError,
    decoder_picture,
    drawable,
    first_of_each_class,
    first_right,
    main,
    mosaic,
    reconstruct,
    sweep,
    to_rgb,
)

CONFIG = CapsNetConfig(
    image_channels=3, image_size=20, classes=3, conv_channels=8, primary_types=2, digit_dim=5, decoder_widths=(12,)
)
NAMES = ("lying", "standing", "square")


def network(config: CapsNetConfig = CONFIG) -> CapsNet:
    """A network whose poses are as long as a trained network's, so that a change of them is visible."""
    torch.manual_seed(0)
    model = CapsNet(config).eval()
    with torch.no_grad():
        model.weight.mul_(30)
    return model


MODEL = network()
IMAGES = torch.randint(0, 256, (12, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
PROBABILITIES, POSES = predict(MODEL, IMAGES)
ANSWERS = PROBABILITIES.argmax(1)
# Only images 3 and 7 are classified right.
LABELS = (ANSWERS + 1 + torch.arange(12) % 2) % 3
LABELS[[3, 7]] = ANSWERS[[3, 7]]


def make_checkpoint(model: CapsNet = MODEL, dataset: str = "mnist") -> Checkpoint:
    return Checkpoint(model.config, dataset, NAMES, {"epochs": 1, "seed": 1}, {}, model.state_dict())


def texts(figure: Any) -> list[str]:
    """Return all texts in a figure."""
    found = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        found += [text.get_text() for text in (*axes.texts, *axes.get_yticklabels(), axes.title)]
    return [text for text in found if text]


def test_the_middle_of_a_sweep_is_the_reconstruction_and_each_step_changes_one_dimension_by_a_twentieth() -> None:
    assert len(OFFSETS) == 11
    assert [round(100 * offset) for offset in OFFSETS] == list(range(-25, 26, 5))
    swept = sweep(MODEL, POSES[0], 1)
    assert swept.shape == (5, 11, 3, 20, 20)
    plain = reconstruct(MODEL, POSES[:1], torch.tensor([1]))[0]
    for dimension in range(5):
        torch.testing.assert_close(swept[dimension, 5], plain)
    changed = POSES[:1].clone()
    changed[0, 1, 3] += 0.15
    torch.testing.assert_close(swept[3, 8], reconstruct(MODEL, changed, torch.tensor([1]))[0])
    assert not torch.allclose(swept[3, 8], plain, atol=1e-4)


def test_a_picture_shows_each_class_with_its_reconstruction_and_the_sweep_of_the_chosen_image() -> None:
    figure = decoder_picture(MODEL, NAMES, IMAGES, LABELS, 7)
    samples, thumbnail, swept = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    shown = first_of_each_class(LABELS, 3)
    rebuilt = reconstruct(MODEL, POSES[shown], ANSWERS[shown])
    np.testing.assert_allclose(samples, mosaic(np.stack([to_rgb(IMAGES[shown]), to_rgb(rebuilt)])), atol=1e-5)
    np.testing.assert_allclose(thumbnail[:20, :20], to_rgb(IMAGES[7]))
    np.testing.assert_allclose(swept, mosaic(to_rgb(sweep(MODEL, POSES[7], int(ANSWERS[7])))), atol=1e-5)
    written = texts(figure)
    name, length = NAMES[ANSWERS[7]], float(PROBABILITIES[7].max())
    assert f"Test image 7 ({name}), pose of {name}, length {length:.2f}: one dimension changed by" in written
    assert f"dimension 4  {float(POSES[7, ANSWERS[7], 4]):+.2f}" in written
    assert [text for text in written if text.startswith("→")] == [
        f"→ {NAMES[ANSWERS[index]]}" for index in shown if index not in (3, 7)
    ]


@pytest.mark.parametrize("objects", [1, 2])
def test_a_decoder_has_learned_when_its_images_vary_with_the_images(
    monkeypatch: pytest.MonkeyPatch, objects: int
) -> None:
    labels = LABELS if objects == 1 else torch.tensor([[2, 0], [1, 2]] * 6)
    drawn = to_pixels(IMAGES[first_of_each_class(labels, 3)]) / objects
    monkeypatch.setattr(pictures, "reconstruct", lambda *_: drawn)
    assert pictures.decoder_has_learned(MODEL, IMAGES, labels, 3)
    monkeypatch.setattr(pictures, "reconstruct", lambda *_: 0.5 + 0.3 * (drawn - 0.5))
    assert not pictures.decoder_has_learned(MODEL, IMAGES, labels, 3)
    assert pictures.decoder_has_learned(MODEL, IMAGES[:1], labels[:1], 3) or objects == 2  # nothing to compare


def test_a_picture_says_when_the_decoder_has_not_learned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    for learned in (True, False):
        monkeypatch.setattr(pictures, "decoder_has_learned", lambda *_, learned=learned: learned)
        told = " ".join(texts(decoder_picture(MODEL, NAMES, IMAGES, LABELS, 0)))
        assert ("The decoder has not learned yet" in told) != learned


def test_of_images_with_two_objects_both_are_reconstructed() -> None:
    labels = torch.tensor([[2, 0], [1, 2]] * 6)
    figure = decoder_picture(MODEL, NAMES, IMAGES, labels, 0)
    samples = np.asarray(figure.axes[0].images[0].get_array())
    assert samples.shape == (3 * 21, 2 * 21, 3)  # an image of 20 and a gap of 1; three rows and two images
    second = reconstruct(MODEL, POSES[:1], most_probable(PROBABILITIES[:1], 2)[:, 1])
    np.testing.assert_allclose(samples[42:62, :20], to_rgb(second)[0], atol=1e-5)
    assert {"lying + square", "standing + square", "reconstruction 1", "reconstruction 2"} <= set(texts(figure))


def test_the_first_image_of_each_class_is_chosen_once() -> None:
    assert first_of_each_class(torch.tensor([2, 2, 0, 2, 0]), 3) == [2, 0]
    assert first_of_each_class(torch.tensor([[2, 0], [1, 2], [0, 1]]), 3) == [0, 1]
    assert first_of_each_class(torch.arange(30).flip(0), 30) == list(range(29, 19, -1))


def test_the_first_image_that_is_classified_right_is_found_of_any_class_or_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pictures, "_BATCH", 2)
    assert first_right(MODEL, IMAGES, LABELS) == 3
    labels = ANSWERS.clone()
    labels[:5] = (labels[:5] + 1) % 3
    of_last = int(ANSWERS[11])
    expected = next(index for index in range(5, 12) if ANSWERS[index] == of_last)
    assert first_right(MODEL, IMAGES, labels, of_last) == expected
    assert first_right(MODEL, IMAGES, (ANSWERS + 1) % 3) is None
    pairs = most_probable(PROBABILITIES, 2).flip(1)
    pairs[0] = torch.tensor([category for category in range(3) if category != pairs[0, 0]])
    assert first_right(MODEL, IMAGES, pairs, int(pairs[1, 0])) == 1


def test_grey_colour_and_other_images_become_rgb() -> None:
    grey = torch.tensor([[[0, 51], [255, 102]]], dtype=torch.uint8)
    np.testing.assert_allclose(to_rgb(grey)[0, 1], [0.2, 0.2, 0.2])
    np.testing.assert_allclose(to_rgb(IMAGES[0])[2, 5], IMAGES[0, :, 2, 5].numpy() / 255, atol=1e-6)
    pair = torch.rand(4, 2, 5, 6)
    assert to_rgb(pair).shape == (4, 5, 12, 3)
    np.testing.assert_array_equal(to_rgb(pair)[..., 6:, 0], pair[:, 1].numpy())


def test_names_that_cannot_be_drawn_give_way_to_their_numbers_and_long_ones_are_cut() -> None:
    assert drawable(["T-shirt/top", "服", "a\nb", "", "x" * 18, "y" * 19]) == [
        "T-shirt/top", "#1", "#2", "#3", "x" * 18, "y" * 17 + "…",
    ]  # fmt: skip


def test_the_same_picture_is_the_same_file_and_dollars_in_names_are_no_formulas(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        pictures.save(decoder_picture(MODEL, ("$a_{", "b$", "$c$"), IMAGES, LABELS, 0), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def make_dataset(images: Tensor = IMAGES, labels: Tensor = LABELS, names: tuple[str, ...] = NAMES) -> Dataset:
    return Dataset("mnist", names, images, labels, images, labels)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint for the command, with the tiny data set."""
    monkeypatch.setattr(datasets, "load", lambda name, folder, source: replace(make_dataset(), name=name))
    save(make_checkpoint(), tmp_path / "capsnet.pt")
    return tmp_path / "capsnet.pt"


def test_the_command_draws_the_first_image_classified_right_or_the_one_asked_for(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = []

    def recorded(model: CapsNet, names: Any, images: Tensor, labels: Tensor, chosen: int) -> Any:
        drawn.append(chosen)
        return decoder_picture(model, names, images, labels, chosen)

    monkeypatch.setattr(pictures, "decoder_picture", recorded)
    out = tmp_path / "picture.png"
    last = NAMES[LABELS[7]]
    for flags in ([], ["--image", "11"], ["--class", last]):
        assert main([str(file), "--out", str(out), *flags]) == 0
    assert drawn == [3, 11, 3 if LABELS[3] == LABELS[7] else 7]
    assert capsys.readouterr().out == f"wrote {out}\n" * 3
    with Image.open(out) as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "12"], "image 12; the test set has the images 0 to 11"),
        (["--image", "-1"], "image -1; the test set has the images 0 to 11"),
        (["--class", "circle"], "--class circle: expected one of lying, standing, square"),
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--out", "nowhere/decoder.png"], "nowhere/decoder.png: No such file or directory"),
    ],
)
def test_the_command_says_in_one_line_that_it_cannot_draw(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(file), *flags]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            make_dataset(names=("a", "b", "c")),
            "the network's labels are lying, standing, square; those of the data a, b, c",
        ),
        (make_dataset(images=IMAGES[:, :1]), "mnist has images of 1 x 20 x 20; the network takes 3 x 20 x 20"),
        (make_dataset(labels=(ANSWERS + 1) % 3), "no test image is classified right; choose one with --image N"),
    ],
)
def test_the_command_says_in_a_line_that_the_data_do_not_fit(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dataset: Dataset, message: str
) -> None:
    monkeypatch.setattr(datasets, "load", lambda name, folder, source: dataset)
    assert main([str(file)]) == 1
    assert capsys.readouterr().err == message + "\n"


def test_the_command_reports_a_bad_checkpoint_in_one_line(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, cut = tmp_path / "other.pt", tmp_path / "cut.pt"
    cut.write_bytes(file.read_bytes()[:500])
    plain = network(replace(CONFIG, decoder_widths=()))
    for checkpoint, message in (
        (replace(make_checkpoint(), config=replace(CONFIG, digit_dim=4)), "the weights do not fit the checkpoint's"),
        (make_checkpoint(plain), "the network has no decoder"),
        (make_checkpoint(dataset="folder:mine"), "trained on folder:mine; give it with --data FOLDER"),
        (make_checkpoint(dataset="letters"), "unknown data set 'letters'"),
        (None, f"{cut}: not a readable PyTorch file, or cut off"),
    ):
        if checkpoint is not None:
            save(checkpoint, other)
        assert main([str(other if checkpoint else cut)]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_data_of_a_folder_come_in_the_size_and_colours_of_the_network(tmp_path: Path) -> None:
    for name in NAMES:
        for index in range(2):
            path = tmp_path / name / f"{index}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("L", (31, 24), 40 * index).save(path)
    trained = replace(make_checkpoint(dataset="folder:x"), labels=tuple(sorted(NAMES)))
    dataset = load_matching(trained, tmp_path)
    assert dataset.test_images.shape == (3, 3, 20, 20)
    with pytest.raises(DatasetError, match="the network's labels are"):
        load_matching(replace(trained, labels=("a", "b", "c")), tmp_path)


def test_a_network_without_a_decoder_has_no_picture() -> None:
    with pytest.raises(PictureError, match="no decoder"):
        decoder_picture(network(replace(CONFIG, decoder_widths=())), NAMES, IMAGES, LABELS, 0)


def test_one_class_and_wide_names_are_drawn_without_a_warning(tmp_path: Path) -> None:
    model = network(replace(CONFIG, classes=1))
    labels = torch.zeros(12, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.save(
            decoder_picture(model, ["服 or a name too long to draw"], IMAGES, labels, 0), tmp_path / "one.png"
        )
