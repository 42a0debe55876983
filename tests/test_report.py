"""Tests of a run's report: its numbers, its pictures and its page."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from training import report
from training.checkpoint import Checkpoint, save
from training.data.datasets import Dataset
from training.data.specs import NONE
from training.evaluate import by_confidence, confusion, most_probable, predict, wrong
from training.model import CONFIGS, CapsNet, CapsNetConfig
from training.pictures import MAX_DRAWN_MISTAKES, confusion_picture, curves_picture, mistakes_picture
from training.report import MAX_TABLE_CLASSES, epoch_curves, wilson, write_report
from training.routing_figures import routing_figures

NAMES = ("T-shirt/top", "a|b", "Ankle boot")
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])
PROBABILITIES = torch.tensor(
    [
        [0.9, 0.1, 0.1],
        [0.5, 0.3, 0.1],  # 1 mistaken for 0, by 0.2
        [0.1, 0.2, 0.8],
        [0.1, 0.9, 0.3],  # 2 mistaken for 1, by 0.6
        [0.1, 0.8, 0.1],
        [0.3, 0.9, 0.1],  # 0 mistaken for 1, by 0.6
    ]
)
IMAGES = torch.randint(0, 256, (6, 1, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
CONFIG = CapsNetConfig(
    image_size=20, classes=3, conv_channels=8, primary_types=2, digit_dim=4, decoder_widths=(6,), digit_bias=True
)
RECIPE = {"epochs": 3, "learning_rate": 0.002, "held_out": None, "seed": 5}
FIGURES: dict[str, Any] = {
    "selected_epoch": 2,
    "held_out_errors": 1,
    "held_out_images": 40,
    "train_images": 440,
    "seconds": 3725.0,
    "command": "python -m training --seed 5",
    "commit": "0123456789ab+changes",
    "device": "A processor, 2 of 2 cores",
    "torch": "2.13.0",
}


def make(
    labels: Tensor = LABELS,
    probabilities: Tensor = PROBABILITIES,
    images: Tensor = IMAGES,
    names: tuple[str, ...] = NAMES,
    config: CapsNetConfig = CONFIG,
    **figures: Any,
) -> tuple[Checkpoint, Dataset, Tensor]:
    """Return the arguments of ``write_report`` after the folder."""
    model = CapsNet(config)
    measured = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "test_errors": int(wrong(probabilities, labels).sum()),
        "test_images": len(labels),
    }
    checkpoint = Checkpoint(config, "folder:my_clothes", names, RECIPE, measured | figures, model.state_dict())
    dataset = Dataset("folder:my_clothes", names, images[:2], labels[:2], images, labels)
    return checkpoint, dataset, probabilities


def log(folder: Path, version: int, *lines: str) -> None:
    path = folder / "logs" / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines) + "\n")


def texts(figure: Any) -> list[str]:
    """Return all texts in a figure."""
    return [text.get_text() for part in (figure, *figure.axes) for text in part.texts]


def test_the_wilson_interval_is_that_of_the_published_formula() -> None:
    # R. G. Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(0, 20)[0] == 0
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(20, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)
    assert wilson(20, 20)[1] == 1
    for count, total in ((0, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match=f"{count} of {total}; expected"):
            wilson(count, total)


def test_the_logs_of_a_run_and_its_resumptions_are_one_curve_and_the_latest_counts(tmp_path: Path) -> None:
    head = "classification_loss_epoch,classification_loss_step,epoch,held_out_loss,step"
    log(tmp_path, 0, head, ",0.9,0,,1", "0.5,,0,,8", ",,0,0.4,8", "0.3,,1,,16")
    log(tmp_path, 2, head, "0.31,,1,,16", ",,1,0.25,16")
    log(tmp_path, 10, head, "0.32,,1,,16", "0.2,,2,,24", "0.1,,", "0.1,,x,,")
    log(tmp_path, 11, "epoch,step,classification_loss_step", "2,20,0.2")
    assert epoch_curves(tmp_path) == {
        "classification_loss_epoch": {1: 0.5, 2: 0.32, 3: 0.2},
        "held_out_loss": {1: 0.4, 2: 0.25},
    }
    assert epoch_curves(tmp_path / "nothing") == {}


def test_the_curves_have_a_panel_for_each_kind_and_mark_the_epoch_that_was_kept() -> None:
    curves = {
        "classification_loss_epoch": {1: 0.5, 2: 0.05, 3: 0.02},
        "held_out_loss": {1: 0.4, 2: 0.03, 3: 0.04},
        "reconstruction_loss_epoch": {1: 0.04, 2: 0.03, 3: 0.02},
        "held_out_error_percent": {1: 20.0, 2: 0.0, 3: 1.0},
    }
    losses, reconstruction, error = curves_picture(curves, 2).axes
    assert [axes.get_title() for axes in (losses, reconstruction, error)] == [
        "classification loss", "reconstruction loss", "held-out error, %",
    ]  # fmt: skip
    assert [line.get_label() for line in losses.get_lines()] == ["training", "held out", "kept: epoch 2"]
    assert np.asarray(losses.get_lines()[1].get_ydata()).tolist() == [0.4, 0.03, 0.04]
    assert np.asarray(losses.get_lines()[1].get_xdata()).tolist() == [1, 2, 3]
    assert losses.get_yscale() == "log"
    assert error.get_yscale() == "linear"

    (alone,) = curves_picture({"classification_loss_epoch": {1: 0.5}}).axes
    assert len(alone.get_lines()) == 1
    assert alone.get_lines()[0].get_marker() == "o"


def test_confusion_counts_labels_in_rows_and_answers_in_columns() -> None:
    assert confusion(PROBABILITIES, LABELS).tolist() == [[1, 1, 0], [1, 1, 0], [0, 1, 1]]
    assert confusion(torch.rand(4, 1), torch.zeros(4, dtype=torch.int64)).tolist() == [[4]]


def test_an_image_of_none_of_the_classes_is_wrong_where_a_capsule_is_long() -> None:
    probabilities = torch.tensor([[0.6, 0.1], [0.5, 0.4], [0.6, 0.1], [0.1, 0.2]])
    assert wrong(probabilities, torch.tensor([NONE, NONE, 0, 0])).tolist() == [True, False, False, True]
    assert wrong(probabilities, torch.tensor([[NONE, NONE]] * 4)).tolist() == [True, False, True, False]


def test_an_image_of_the_only_class_is_wrong_where_its_capsule_is_not_long() -> None:
    probabilities = torch.tensor([[0.6], [0.4], [0.6], [0.4]])
    assert wrong(probabilities, torch.tensor([0, 0, NONE, NONE])).tolist() == [False, True, True, False]


def test_confusion_of_pairs_counts_the_labels_missed_against_the_classes_wrongly_given() -> None:
    probabilities = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.9, 0.8, 0.1, 0.0], [0.1, 0.2, 0.9, 0.8]])
    labels = torch.tensor([[1, 0], [3, 0], [1, 0]])  # right; 3 mistaken for 1; 0 and 1 mistaken for 2 and 3
    counts = confusion(probabilities, labels)
    assert counts.tolist() == [[2, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert counts.sum(1).tolist() == labels.flatten().bincount(minlength=4).tolist()


def test_the_confusion_picture_writes_the_counts_and_colours_the_mistakes_alone() -> None:
    counts = torch.tensor([[9870, 1, 0], [25, 8, 0], [0, 0, 7]])
    figure = confusion_picture(counts, NAMES)
    (axes,) = figure.axes
    cells = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert cells == {((0, 0), "9870"), ((1, 0), "1"), ((0, 1), "25"), ((1, 1), "8"), ((2, 2), "7")}
    coloured = axes.images[0].get_array()
    assert coloured is not None
    assert np.ma.filled(coloured, 0).tolist() == [[0, 1, 0], [25, 0, 0], [0, 0, 0]]
    assert [text.get_text() for text in axes.get_yticklabels()] == list(NAMES)
    assert axes.get_title(loc="left") == "26 mistakes among 9,911 test labels"


@pytest.mark.parametrize("classes", [1, 10, 100])
def test_the_text_of_a_confusion_matrix_fits_its_cells_and_can_be_read(classes: int) -> None:
    figure = confusion_picture(
        1000 * torch.eye(classes, dtype=torch.int64), [f"a long class name {n}" for n in range(classes)]
    )
    (axes,) = figure.axes
    cell = 72 * figure.get_size_inches()[0] / classes  # points
    size = axes.texts[0].get_fontsize()
    assert isinstance(size, float)
    assert size >= 6
    assert 4 * 0.64 * size < cell  # DejaVu Sans' digits are 0.64 of its size wide
    assert axes.get_yticklabels()[0].get_fontsize() <= cell


def test_mistakes_are_ordered_by_how_much_longer_the_wrong_capsule_is() -> None:
    assert by_confidence(PROBABILITIES, LABELS) == [3, 5, 1]  # 3 and 5 are equal
    assert by_confidence(PROBABILITIES, PROBABILITIES.argmax(1)) == []
    assert by_confidence(0.51 + torch.rand(3, 1) / 3, torch.zeros(3, dtype=torch.int64)) == []
    assert by_confidence(torch.tensor([[0.4], [0.9], [0.1]]), torch.zeros(3, dtype=torch.int64)) == [2, 0]
    pairs = torch.tensor([[0.9, 0.2, 0.5], [0.9, 0.1, 0.8]])
    assert by_confidence(pairs, torch.tensor([[0, 1], [1, 0]])) == [1, 0]
    pairs = torch.tensor([[0.9, 0.2, 0.5], [0.6, 0.4, 0.65]])  # sorted by the shorter capsule of the labels
    assert by_confidence(pairs, torch.tensor([[0, 1], [1, 0]])) == [0, 1]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_tile_has_the_image_its_label_the_answer_and_their_lengths(channels: int) -> None:
    images = IMAGES.repeat(1, channels, 1, 1)
    figure = mistakes_picture(images, LABELS, PROBABILITIES, NAMES)
    assert len(figure.axes) == 3
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "image 3\nAnkle boot  0.30", "a|b  0.90",
    ]  # fmt: skip
    pixels = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_allclose(pixels[:, :20, 0], images[3, 0].numpy() / 255, atol=1e-6)
    assert texts(figure)[0] == "3 mistakes in 6 test images"


def test_a_tile_of_a_pair_has_both_labels_and_both_answers() -> None:
    figure = mistakes_picture(IMAGES[:1], torch.tensor([[2, 0]]), PROBABILITIES[5:], NAMES)
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "image 0\nT-shirt/top  0.30\nAnkle boot  0.10", "T-shirt/top  0.30\na|b  0.90",
    ]  # fmt: skip


def test_only_the_worst_mistakes_are_drawn_and_a_page_without_mistakes_says_so() -> None:
    count = MAX_DRAWN_MISTAKES + 5
    labels = torch.ones(count, dtype=torch.int64)
    probabilities = torch.stack([torch.linspace(0.5, 0.9, count), torch.full((count,), 0.1)], 1)
    figure = mistakes_picture(IMAGES[:1].repeat(count, 1, 1, 1), labels, probabilities, ("a", "b"))
    assert len(figure.axes) == MAX_DRAWN_MISTAKES
    assert f"image {count - 1}\nb  0.10" in texts(figure)
    assert texts(figure)[0] == "The 40 most confident of 45 mistakes in 45 test images"
    assert texts(mistakes_picture(IMAGES, PROBABILITIES.argmax(1), PROBABILITIES, NAMES)) == [
        "No mistakes: all 6 test images are classified right."
    ]


def test_the_report_names_the_network_its_selection_and_the_intervals_of_its_errors(tmp_path: Path) -> None:
    log(tmp_path, 0, "epoch,classification_loss_epoch", "0,0.5")
    checkpoint, dataset, probabilities = make(**FIGURES)
    write_report(tmp_path, checkpoint, dataset, probabilities)
    page = (tmp_path / "report.md").read_text()
    decoder = 3 * 4 * 6 + 6 + 6 * 400 + 400
    everything = checkpoint.figures["parameters"]
    for line in (
        "# folder:my\\_clothes, own config: test error 50.00 % (3 of 6)",
        "| held out | 40 | 1 | 2.50 % | 0.44 to 12.88 % |",
        "| test | 6 | 3 | 50.00 % | 18.76 to 81.24 % |",
        f"| parameters | {everything - decoder:,} without the decoder, {everything:,} with it |",
        "| recipe | epochs 3, learning_rate 0.002, held_out default, seed 5 |",
        "| seed | 5 |",
        "| training time | 62 min |",
        "| device | A processor, 2 of 2 cores |",
        "| commit | 0123456789ab+changes |",
        "| PyTorch | 2.13.0 |",
        "    python -m training --seed 5",
        "| 1 | a\\|b | 2 | 1 | 50.00 % | T-shirt/top (1) |",
    ):
        assert line in page.splitlines()
    for text in (
        "One run, with one seed (5)",
        "The test set was read once",
        "epoch 2 of 3",
        "images of 1 x 20 x 20, classes: 3; 440 to train on, 40 held out, 6 for the test",
        "digit_bias True",
    ):
        assert text in page
    links = re.findall(r"!\[.*\]\((.*)\)", page)
    assert links == ["curves.png", "confusion.png", "mistakes.png", "decoder.png"]
    for link in links:
        with Image.open(tmp_path / link) as picture:
            assert picture.format == "PNG"


def test_the_report_has_the_calibration_and_the_commands_that_come_next(tmp_path: Path) -> None:
    checkpoint, dataset, probabilities = make(**FIGURES)
    folder = tmp_path / "my-run"
    folder.mkdir()
    write_report(folder, checkpoint, dataset, probabilities)
    page = (folder / "report.md").read_text()
    # Lengths 0.9, 0.9, 0.9: one right; 0.8, 0.8: both right; 0.5: wrong.
    error = (abs(1 - 2.7) + abs(2 - 1.6) + 0.5) / 6
    assert f"differs from the share of right answers by {100 * error:.2f} points on average" in page
    assert f"    python -m export {folder} {tmp_path / 'models'} --data FOLDER" in page.splitlines()
    assert f"    python -m serving --models {tmp_path / 'models'}" in page.splitlines()
    assert "lowest in the last epoch" not in page


def test_the_report_advises_more_epochs_where_the_last_was_the_best(tmp_path: Path) -> None:
    write_report(tmp_path, *make(**FIGURES | {"selected_epoch": 3}))
    assert "lowest in the last epoch, so more epochs may lower it further: the training command with " in (
        page := (tmp_path / "report.md").read_text()
    )
    assert "`--resume --epochs 6`" in page


@pytest.mark.parametrize("learned", [True, False])
def test_the_report_says_when_the_decoder_has_not_learned_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learned: bool
) -> None:
    if learned:
        monkeypatch.setattr(report, "decoder_has_learned", lambda *_: True)
    write_report(tmp_path, *make(**FIGURES))  # the weights are random
    assert ("The decoder has not learned yet" in (tmp_path / "report.md").read_text()) != learned


def test_the_report_tells_what_routing_does(tmp_path: Path) -> None:
    checkpoint, dataset, probabilities = make(**FIGURES)
    write_report(tmp_path, checkpoint, dataset, probabilities)
    lines = (tmp_path / "report.md").read_text().splitlines()
    figures = routing_figures(checkpoint.model(), IMAGES)
    assert "## What routing does" in lines
    assert f"| mean length of the primary capsules | {figures.primary_length:.4f} |" in lines
    assert "| entropy of the couplings in iteration 1 | 1.0000 |" in lines
    assert f"| entropy of the couplings in iteration 3 | {figures.entropies[2]:.4f} |" in lines
    assert f"| answers that one iteration changes | {figures.changed} of 6 |" in lines


@pytest.mark.parametrize("objects", [1, 2])
def test_the_figures_of_routing_are_those_of_the_networks_capsules_and_couplings(objects: int) -> None:
    model = CapsNet(replace(CONFIG, routing_iterations=2)).eval()
    with torch.no_grad():
        model.primary.weight.mul_(30)
        model.weight.mul_(30)  # so that routing decides something
    images = torch.randint(0, 256, (250, 1, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    figures = routing_figures(model, images, objects)

    with torch.no_grad():
        u = model.primary_capsules(images / 255)
        poses, couplings = model.with_couplings(images / 255)
        model.config = replace(model.config, routing_iterations=1)
        uniform = model(images / 255)
    assert figures.images == 250
    assert figures.primary_length == pytest.approx(u.norm(dim=-1).mean().item(), rel=1e-5)
    entropy = -(couplings * couplings.log()).sum(1).mean().item() / np.log(3)
    assert figures.entropies == pytest.approx((1, entropy), rel=1e-4)
    assert entropy < 0.9
    best, other = (most_probable(one.norm(dim=-1), objects) for one in (poses, uniform))
    assert figures.changed == (best != other).any(1).sum()
    assert figures.changed > 0


@pytest.mark.parametrize("normalization", ["softmax", "max-min"])
def test_the_figures_of_routing_are_finite_for_every_network(normalization: str) -> None:
    for classes in (1, 3):
        figures = routing_figures(CapsNet(replace(CONFIG, classes=classes, normalization=normalization)).eval(), IMAGES)
        assert len(figures.entropies) == (0 if classes == 1 else 3)
        assert all(0 <= entropy <= 1 + 1e-6 for entropy in figures.entropies)


def test_a_network_without_a_decoder_that_was_trained_on_all_images_has_a_shorter_report(tmp_path: Path) -> None:
    config = CapsNetConfig(image_size=20, classes=3, conv_channels=8, primary_types=2, decoder_widths=())
    write_report(tmp_path, *make(config=config))
    page = (tmp_path / "report.md").read_text()
    assert re.findall(r"\]\((.*)\)", page) == ["confusion.png", "mistakes.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confusion.png", "mistakes.png", "report.md"]
    assert "No images were held out: the weights are those of the last epoch, 3." in page
    assert "it has no decoder" in page
    assert "held out |" not in page


@pytest.mark.parametrize("objects", [1, 2])
def test_a_report_of_one_class_or_of_pairs_in_colour_is_written(tmp_path: Path, objects: int) -> None:
    classes = 1 if objects == 1 else 3
    config = CapsNetConfig(
        image_channels=3, image_size=20, classes=classes, conv_channels=8, primary_types=2, decoder_widths=(6,)
    )
    labels = torch.zeros(6, dtype=torch.int64) if objects == 1 else torch.tensor([[0, 1], [2, 1]] * 3)
    images = IMAGES.repeat(1, 3, 1, 1)
    write_report(tmp_path, *make(labels, PROBABILITIES[:, :classes], images, NAMES[:classes], config))
    assert {"confusion.png", "mistakes.png", "decoder.png", "report.md"} == {path.name for path in tmp_path.iterdir()}


def test_of_many_classes_the_table_has_the_worst_and_names_need_not_be_text(tmp_path: Path) -> None:
    count = MAX_TABLE_CLASSES + 10
    config = CapsNetConfig(image_size=20, classes=count, conv_channels=8, primary_types=2, decoder_widths=())
    labels = torch.arange(count)
    probabilities = torch.eye(count)
    probabilities[25] = probabilities[3]
    names = tuple(f"kind {number}\udcff" for number in range(count))
    images = torch.zeros(count, 1, 20, 20, dtype=torch.uint8)
    write_report(tmp_path, *make(labels, probabilities, images, names, config))
    lines = (tmp_path / "report.md").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| # | class"))
    assert lines[start + 2].startswith("| 25 | kind 25\\udcff | 1 | 1 | 100.00 % | kind 3")
    assert len([line for line in lines[start + 2 :] if line.startswith("|")]) == MAX_TABLE_CLASSES


def test_the_network_is_named_after_its_config_whatever_the_sizes_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        CONFIGS,
        "tiny",
        CapsNetConfig(conv_channels=8, primary_types=2, digit_dim=4, decoder_widths=(6,), digit_bias=True),
    )
    write_report(tmp_path, *make())
    assert (tmp_path / "report.md").read_text().startswith("# folder:my\\_clothes, tiny: test error")


def test_probabilities_that_belong_to_other_images_are_refused(tmp_path: Path) -> None:
    checkpoint, dataset, probabilities = make()
    with pytest.raises(ValueError, match=r"probabilities of shape \(5, 3\); expected \(6, 3\)"):
        write_report(tmp_path, checkpoint, dataset, probabilities[:5])
    with pytest.raises(ValueError, match="mistakes; the checkpoint has 3"):
        write_report(tmp_path, checkpoint, dataset, probabilities.roll(1, 0))
    assert not list(tmp_path.iterdir())


def test_the_report_of_a_finished_run_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, dataset, _ = make()
    probabilities, _ = predict(checkpoint.model(), dataset.test_images)
    errors = int(wrong(probabilities, dataset.test_labels).sum())
    own = replace(checkpoint, figures=checkpoint.figures | {"test_errors": errors})
    save(own, tmp_path / "capsnet.pt")
    monkeypatch.setattr("training.report.load_matching", lambda *_, **__: dataset)
    assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'report.md'}\n"
    assert f"({errors} of " in (tmp_path / "report.md").read_text()

    monkeypatch.setattr("training.report.predict", Mock(side_effect=KeyboardInterrupt))
    assert report.main([str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"

    assert report.main([str(tmp_path / "nowhere")]) == 1
    assert "capsnet.pt: no such file" in capsys.readouterr().err
