"""The benchmark of capsules that can be absent: its networks, its figures, and its file of results."""

import csv
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from benchmarks import absent_capsules
from benchmarks.absent_capsules import RECIPE, TRIES, Try, main, measure, train
from benchmarks.absent_network import (
    NORMALIZATIONS,
    SQUASHES,
    Change,
    ChangedCapsNet,
    route_scaled,
    squash_primary,
)
from training.data.datasets import Dataset
from training.model import CONFIGS, CapsNet, CapsNetConfig, Routing, lengths, route, squash

TINY = CapsNetConfig(
    stem=((4, 5, 2, 2), (8, 3, 2, 1)), primary_types=2, primary_kernel=3, primary_stride=1, decoder_widths=(8,)
)


@pytest.fixture(scope="module", autouse=True)
def process_state() -> Iterator[None]:
    """Undo what a training changes for the whole process."""
    with isolate_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("PL_SEED_WORKERS", "0")
        patch.setitem(CONFIGS, "tiny", TINY)
        yield


def images_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def dataset(count: int = 60) -> Dataset:
    """A data set without test images: reading them fails."""
    labels = torch.arange(count) % 10
    return Dataset("tiny", tuple("0123456789"), images_of(count), labels, torch.empty(0), torch.empty(0))


def network(change: Change, seed: int = 1) -> ChangedCapsNet:
    torch.manual_seed(seed)
    return ChangedCapsNet(TINY, change).eval()


def test_a_network_without_changes_is_the_network_of_training_bit_for_bit() -> None:
    torch.manual_seed(1)
    expected = CapsNet(TINY).eval()
    pixels = torch.rand(3, 1, 28, 28)
    found = network(Change())
    assert all(a.equal(b) for a, b in zip(found.state_dict().values(), expected.state_dict().values(), strict=True))
    for one, other in zip(found.with_couplings(pixels), expected.with_couplings(pixels), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("name", TRIES)
def test_every_try_has_a_network_with_finite_gradients_and_begins_as_that_of_its_config(name: str) -> None:
    one = TRIES[name]
    torch.manual_seed(1)
    model = ChangedCapsNet(one.config("fast"), one.change)
    torch.manual_seed(1)
    assert model.weight.equal(CapsNet(one.config("fast")).weight)
    poses = model(torch.cat([torch.rand(3, 1, 28, 28), torch.zeros(1, 1, 28, 28)]))
    (lengths(poses).sum() + model.primary_lengths.mean()).backward()  # type: ignore[no-untyped-call]
    assert poses.shape == (4, 10, 16) and model.primary_lengths.shape == (4, 100)
    gradients = [value.grad for value in model.parameters() if value.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    assert model.primary.weight.grad is not None and model.primary.weight.grad.any()


@pytest.mark.parametrize("kind", SQUASHES)
def test_a_squash_keeps_directions_makes_lengths_below_1_that_grow_and_passes_zero(kind: str) -> None:
    direction = torch.nn.functional.normalize(torch.rand(8, generator=torch.Generator().manual_seed(0)), dim=0)
    s = torch.tensor([0.0, 0.5, 1.5, 4.0, 9.0]).unsqueeze(1) * direction
    s.requires_grad_()
    u = squash_primary(s, kind)
    u.sum().backward()  # type: ignore[no-untyped-call]
    length = lengths(u.detach())
    assert s.grad is not None and s.grad.isfinite().all()
    assert length[0] == 0 and (length[2:] > length[1:-1]).all() and length[-1] < 1
    torch.testing.assert_close(u[-1].detach(), length[-1] * direction)
    if kind == "paper":
        assert u.equal(squash(s))
    if kind == "threshold":
        assert length[1] == 0


def test_a_learned_scale_routes_as_a_fixed_one_of_the_same_value() -> None:
    u, weight = squash(torch.randn(4, 30, 8)), 0.3 * torch.randn(30, 8, 10, 16)
    for iterations, scale in product((1, 2, 3), (1.0, 4.0)):
        fixed = route(u, weight, Routing(iterations, scale=scale))
        learned = route_scaled(u, weight, iterations, torch.tensor(scale))
        for one, other in zip(learned, fixed, strict=True):
            torch.testing.assert_close(one, other)


def test_types_that_compete_share_one_presence_at_a_position() -> None:
    pixels = torch.rand(3, 1, 28, 28)
    plain = lengths(network(Change()).primary_capsules(pixels))
    model = network(Change(types_compete=True))
    assert model.gate.bias is not None
    torch.nn.init.constant_(model.gate.bias, 9.0)
    model.primary_capsules(pixels)
    assert (model.primary_lengths < plain).all()
    positions = (model.primary_lengths / plain).reshape(3, TINY.primary_types, -1).sum(1)
    assert ((positions > 0.99) & (positions < 1)).all()


def test_a_gate_of_the_config_is_that_of_the_network_of_training() -> None:
    pixels, config = torch.rand(3, 1, 28, 28), replace(TINY, primary_gate=True, routing_scale=16.0)
    torch.manual_seed(1)
    expected = CapsNet(config).eval()
    torch.manual_seed(1)
    assert ChangedCapsNet(config, Change()).eval()(pixels).equal(expected(pixels))


def test_only_the_longest_capsules_of_an_image_remain() -> None:
    pixels = torch.rand(3, 1, 28, 28)
    u, kept = (network(Change(longest=longest)).primary_capsules(pixels) for longest in (0, 7))
    for one, other in zip(u, kept, strict=True):
        longest = lengths(one).argsort(descending=True)[:7]
        assert other[longest].equal(one[longest]) and int(lengths(other).count_nonzero()) == 7


def test_a_normalization_changes_the_capsules_before_their_squash() -> None:
    pixels = torch.rand(3, 1, 28, 28)
    torch.manual_seed(1)
    model = ChangedCapsNet(TINY, Change(normalization="type"))
    maps = model.normalize(model.primary(model.stem(pixels))).unflatten(1, (TINY.primary_types, -1))
    torch.testing.assert_close(maps.mean((2, 3, 4)), torch.zeros(3, TINY.primary_types), atol=1e-5, rtol=0)
    assert set(NORMALIZATIONS) == {"none", "batch", "type"}


@pytest.mark.parametrize("wrong", [{"squash": "other"}, {"normalization": "layer"}])
def test_an_unknown_change_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected one of"):
        Change(**wrong)


class Fixed(ChangedCapsNet):
    """A network whose capsules and couplings are given: half of the capsules absent where the image is black."""

    def primary_capsules(self, images: Tensor) -> Tensor:
        black = images.flatten(1).amax(1) == 0
        u = torch.zeros(len(images), 4, 8)
        u[:, :, 0] = torch.where(black[:, None], torch.tensor([0.95, 0.95, 0.0, 0.0]), torch.full((4,), 0.95))
        return u

    def routed(self, u: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        poses = torch.zeros(len(u), 10, 16)
        poses[:, 3 if iterations == 1 else 4, 0] = 0.9
        couplings = torch.full((len(u), 10, 4), 0.1)
        if iterations == 3:
            couplings[:, :, :2] = torch.eye(10)[:, :1]  # the first two primary capsules choose one parent
        return poses, couplings


def test_figures_count_errors_absence_and_couplings() -> None:
    images = torch.cat([torch.zeros(5, 1, 28, 28, dtype=torch.uint8), images_of(5)])
    found = measure(Fixed(TINY, Change()), images, torch.tensor([4] * 7 + [3] * 3), images[:5])
    assert (found["held_out_errors"], found["one_iteration_errors"], found["one_iteration_changes"]) == (3, 7, 10)
    assert found["primary_length"] == pytest.approx(0.75 * 0.95)
    assert (found["primary_absent"], found["primary_present"], found["switching"]) == (0.25, 0.75, 0.5)
    assert [found[f"entropy_{n}"] for n in (1, 2, 3)] == pytest.approx([1, 1, 0.5])
    assert found["present_entropy"] == pytest.approx((5 * 0.0 + 5 * 0.5) / 10)
    assert found["largest_coupling"] == pytest.approx(0.55)
    assert [found["none_primary_length"], found["none_found"]] == pytest.approx([0.475, 1.0])


def test_a_penalty_shortens_primary_capsules_and_no_test_image_is_read() -> None:
    recipe = replace(RECIPE, epochs=3, batch_size=16, precision="32-true", held_out=10)
    found = [
        train(one, "tiny", recipe, dataset()) for one in (Try(""), Try("", penalty=30.0), Try("", none_penalty=30.0))
    ]
    assert all(one["primary_length"] < found[0]["primary_length"] - 0.05 for one in found[1:])
    assert all(one["held_out_images"] == 10 and math.isfinite(one["entropy_3"]) for one in found)


def test_a_try_with_a_row_is_not_trained_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained: list[tuple[Try, int]] = []

    def fake(one: Try, name: str, recipe: Any, dataset: Dataset) -> dict[str, Any]:
        trained.append((one, recipe.seed))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return dict.fromkeys(("held_out_errors", "one_iteration_changes"), 1) | {
            "primary_length": 2 / 3, "largest_coupling": 0.1, "precision": "32-true", "cpu_seconds": 1.0,
        }  # fmt: skip

    monkeypatch.setattr(absent_capsules, "train", fake)
    monkeypatch.setattr(absent_capsules, "load_or_exit", lambda *_: dataset())
    out = tmp_path / "tries.csv"
    arguments = ["--tries", "baseline", "scale 8", "--seeds", "1", "2", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    assert main(arguments) == 0
    both = [(TRIES[name], seed) for name in ("baseline", "scale 8") for seed in (1, 2)]
    assert trained == [*both[:3], *both[2:]]
    with out.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["try"], row["seed"], row["primary_length"]) for row in rows] == [
        (name, seed, "0.66667") for name in ("baseline", "scale 8") for seed in "12"
    ]
    assert {row["torch"] for row in rows} == {torch.__version__}
