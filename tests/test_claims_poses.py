"""Tests of the claims on poses and routing: measures with known answers, and rows on untrained networks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from serving.files.idx import read_idx
from tests.claims_report import words_of
from tests.conftest import ROOT
from training.calibration import expected_calibration_error
from training.claims.bench import Bench
from training.claims.evidence import Comparison, bootstrap
from training.claims.images import Images, Labelled
from training.claims.jobs import SCALES, Job
from training.claims.known_changes import CHANGES, shifted, thickened
from training.claims.nets import CapsuleNet, NetSpec, PlainNet, build
from training.claims.regression import explained, fit, principal
from training.claims.rows import confidence, equivariance, hierarchy, readable_poses, routing_parts
from training.claims.rows.confidence import Answers
from training.claims.store import Store
from training.claims.strokes import ATTRIBUTES, attributes, ranks


@pytest.fixture(scope="module")
def images() -> Images:
    """Return digits of MNIST's test set in place of all images."""
    folder = ROOT / "tests" / "data"
    pixels, labels = (
        torch.from_numpy(read_idx((folder / f"t10k-{name}.gz").read_bytes()))
        for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    digits = Labelled(pixels[:, None], labels.long())
    held_out, test = (
        Labelled(digits.images[start : start + 100], digits.labels[start : start + 100]) for start in (0, 200)
    )
    return Images(held_out, held_out, test, held_out, test)


class Untrained(Store):
    """A store that has a network with random weights for every job."""

    def net(self, job: Job) -> CapsuleNet | PlainNet:
        torch.manual_seed(job.seed)
        return build(NetSpec(job.kind, "tiny"))


@pytest.fixture
def bench(images: Images, tmp_path: Path) -> Bench:
    scale = replace(SCALES["quick"], seeds=(1,), costly=20)
    return Bench(scale, Untrained(tmp_path), images)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_linear_function_of_the_features_is_read_exactly_from_others() -> None:
    features, others = uniform(50, 4), uniform(30, 4, seed=1)
    weights = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.5, 1.0]], dtype=torch.float64)
    reading = fit(features, features @ weights + 7)
    true = others @ weights + 7
    assert explained(reading(others), true).mean(0).tolist() == pytest.approx([1, 1], abs=1e-6)


def test_nothing_is_read_from_features_that_say_nothing() -> None:
    numbers = uniform(400, 1)
    found = fit(uniform(400, 20, seed=1), numbers)(uniform(300, 20, seed=2))
    assert float(explained(found, uniform(300, 1, seed=3)).mean()) == pytest.approx(0, abs=0.1)
    constant = fit(torch.ones(400, 3), numbers)(torch.ones(5, 3))
    assert constant.flatten().tolist() == pytest.approx([float(numbers.mean())] * 5)


def test_the_first_component_is_the_direction_of_the_largest_spread() -> None:
    direction = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    features = 10 * uniform(200, 1) * direction + 0.01 * uniform(200, 3, seed=1)
    components = principal(features, 2)
    assert float((components.directions[:, 0] @ direction).abs()) == pytest.approx(1, abs=1e-4)
    assert components(features).shape == (200, 2)
    assert float(components(features).mean()) == pytest.approx(0, abs=1e-9)


def test_a_shift_by_whole_pixels_moves_the_pixels(images: Images) -> None:
    pixels = images.test.pixels[:3]
    moved = shifted(pixels, torch.tensor([1.0, 0.0, -2.0]), torch.tensor([0.0, 3.0, 0.0]))
    expected = [pixels[0].roll(1, 2), pixels[1].roll(3, 1), pixels[2].roll(-2, 2)]
    torch.testing.assert_close(moved, torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: str(one.name))
def test_a_change_by_nothing_changes_nothing_and_others_stay_within_the_limits(change, images: Images) -> None:  # type: ignore[no-untyped-def]
    pixels = images.test.pixels[:4]
    nothing = torch.full((4,), 1.0 if change.name.startswith("scale") else 0.0)
    torch.testing.assert_close(change(pixels, nothing), pixels, atol=1e-5, rtol=0)
    drawn = change.drawn(500, torch.Generator().manual_seed(0))
    assert change.low <= float(drawn.min()) < float(drawn.max()) <= change.high
    assert not torch.allclose(change(pixels, drawn[:4]), pixels, atol=0.05)


def bar(width: int, height: int, slant: float = 0.0) -> Tensor:
    """Return an image (1, 1, 64, 64) of a bar."""
    image = torch.zeros(1, 1, 64, 64)
    top = (64 - height) // 2
    for row in range(top, top + height):
        left = round(32 - width / 2 + slant * (31.5 - row))
        image[0, 0, row, left : left + width] = 1
    return image


def test_thickness_width_and_slant_of_a_bar_are_its_own() -> None:
    thickness, width, slant = attributes(bar(4, 50))[0].tolist()
    assert thickness == pytest.approx(4 * 50 / (4 + 50), rel=0.05)
    assert width == pytest.approx(4, rel=0.05) and slant == pytest.approx(0, abs=1e-9)
    for lean in (0.4, -0.3):
        _, width, slant = attributes(bar(4, 40, lean))[0].tolist()
        assert slant == pytest.approx(lean, abs=0.02) and width == pytest.approx(4, rel=0.1)
    assert attributes(torch.zeros(2, 1, 28, 28)).abs().max() == 0


def test_thicker_digits_measure_thicker(images: Images) -> None:
    pixels = images.test.pixels[:20]
    thin, plain, thick = (attributes(thickened(pixels, torch.full((20,), by)))[:, 0] for by in (-0.5, 0.0, 1.0))
    assert (thin < plain).all() and (plain < thick).all()


def test_ranks_share_their_mean_where_values_are_equal() -> None:
    found = ranks(torch.tensor([[5.0, 1.0], [1.0, 1.0], [5.0, 1.0], [9.0, 1.0]]))
    assert (found[0, 0], found[1, 0], found[3, 0]) == pytest.approx((0.0, -(2**0.5), 2**0.5))
    assert found[0, 0] == found[2, 0] and found[:, 1].abs().max() == 0


def test_the_parts_of_the_calibration_error_add_up_to_it() -> None:
    predicted = uniform(1000).numpy()
    right = (uniform(1000, seed=1).numpy() < predicted**2).astype(float)
    parts = confidence.calibration_parts(predicted, right)
    assert parts.mean() == pytest.approx(-expected_calibration_error(predicted, right))
    said, true = confidence.reliability(predicted, right)
    assert len(said) == 15 and all(high < low + 0.1 for high, low in zip(true, said, strict=True))


def test_unknown_images_are_ranked_by_the_share_of_digits_above_them() -> None:
    digits = np.array([0.9, 0.8, 0.7, 0.6])
    assert confidence.ranked_above(digits, np.array([0.1, 0.95, 0.75, 0.8])).tolist() == [1, 0, 0.5, 0.375]


def say(score: float, right: float, unknown: float) -> Answers:
    """Return the answers of a network that says the same of all digits, and the same of all other images."""
    rights = np.arange(100) < 100 * right
    one = np.full(100, score)
    others = {name: np.full(count, unknown) for name, count in (("black", 1), ("noise", 50), ("clothes", 50))}
    return Answers(rights.astype(float), one, one, others)


def test_the_better_probability_wins_and_the_verdict_turns_with_the_sides() -> None:
    good, bad = [say(0.9, 0.9, 0.2)] * 3, [say(0.7, 0.9, 0.8)] * 3
    for ours, plain, sign in ((good, bad, 1), (bad, good, -1)):
        found = confidence.evidence({"K3": ours, "C0": plain})
        assert [np.sign(bootstrap(one, 50).mean) for one in found.comparisons] == [sign] * 4
        assert bootstrap(found.comparisons[0], 50).mean == pytest.approx(20 * sign)
    assert found.figures["share above 0.5 in % by seed"]["black"] == {"K3": [100.0] * 3, "C0": [0.0] * 3}
    assert found.figures["AUROC by seed"]["noise"]["C0"] == [1.0] * 3


def synthetic(count: int, seed: int) -> equivariance.Changed:
    labels = torch.arange(count) % 2
    return equivariance.Changed(torch.zeros(3, count, 1, 2, 2), labels, uniform(2, count, seed=seed))


def poses_with(digits: equivariance.Changed, holds: Callable[[Tensor], Tensor]) -> Tensor:
    """Return features (3, N, 4): two of the digit's own, and two that hold the amount of the change, or none."""
    count = len(digits)
    own = uniform(count, 2, seed=count).expand(3, -1, -1)
    amounts = torch.cat([torch.zeros(1, count), digits.amounts])
    return torch.cat([own, holds(amounts).unsqueeze(2), (own[..., 0] + holds(amounts)).unsqueeze(2)], 2)


def test_a_pose_that_holds_a_change_exactly_gives_all_of_it_and_one_without_it_nothing() -> None:
    fitting, judging = synthetic(100, 1), synthetic(80, 2)
    exact = [poses_with(one, lambda amounts: 3 - 2 * amounts) for one in (fitting, judging)]
    still, moved = equivariance.readings(fitting, judging, exact[0], exact[1])
    assert still.shape == (2, 80) and still.mean(1) == pytest.approx([1, 1], abs=1e-4)
    assert moved.mean(1) == pytest.approx([1, 1], abs=1e-4)
    none = [poses_with(one, torch.zeros_like) for one in (fitting, judging)]
    assert (equivariance.readings(fitting, judging, none[0], none[1])[1].mean(1) < 0.1).all()


def test_a_change_hidden_by_the_digits_own_spread_is_read_from_the_change_alone() -> None:
    fitting, judging = synthetic(200, 3), synthetic(160, 4)

    def hidden(digits: equivariance.Changed) -> Tensor:
        own = 20 * uniform(len(digits), 1, seed=len(digits)).expand(3, -1, -1)
        return own + torch.cat([torch.zeros(1, len(digits)), digits.amounts]).unsqueeze(2)

    still, moved = equivariance.readings(fitting, judging, hidden(fitting), hidden(judging))
    assert still.mean() < 0.1 and moved.mean() == pytest.approx(1, abs=1e-4)


def measured(value: float) -> dict[str, np.ndarray]:
    names = (equivariance.POSE, equivariance.FEATURES, equivariance.FEATURES_16)
    parts = {f"{prefix}{name}": np.full((7, 50), value) for name in names for prefix in ("", "change of ")}
    return {**parts, "right": np.full((7, 50), 100 * value)}


def test_equivariance_is_confirmed_for_the_side_that_holds_the_changes() -> None:
    pixels = {name: np.full((7, 50), 0.5) for name in (equivariance.PIXELS_16, f"change of {equivariance.PIXELS_16}")}
    for ours, plain in ((0.9, 0.6), (0.6, 0.9)):
        kinds = {kind: [measured(ours if kind == "K3" else plain)] * 2 for kind in equivariance.KINDS}
        found = equivariance.evidence(kinds, pixels)
        first = bootstrap(found.comparisons[0], 50)
        assert first.mean == pytest.approx(ours - plain) and (first.low > 0) == (ours > plain)
    assert found.figures["errors in % by shift in pixels"]["C0"]["6"] == pytest.approx(10)


def test_the_number_that_follows_an_attribute_is_found_with_its_sign() -> None:
    labels = torch.arange(120) % 3
    numbers, true = uniform(120, 5), uniform(120, 3, seed=1)
    numbers[:, 3] = true[:, 0] ** 3
    numbers[:, 1] = -true[:, 2]
    chosen = readable_poses.choose(numbers, true, labels, 3)
    assert chosen.number[:, [0, 2]].tolist() == [[3, 1]] * 3 and chosen.sign[:, [0, 2]].tolist() == [[1, -1]] * 3
    found = readable_poses.agreement(chosen, numbers, true, labels)
    assert found[[0, 2]].mean(1) == pytest.approx([1, 1]) and abs(found[1].mean()) < 0.6


def test_a_slider_goes_from_one_end_to_the_other_and_moves_one_number() -> None:
    numbers = uniform(2, 3).float()
    found = readable_poses.slide(numbers, torch.tensor([0, 2]), torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 10.0]))
    assert found.shape == (2, 11, 3)
    assert found[0, [0, 5, 10], 0].tolist() == [-1, 0, 1] and found[1, [0, 10], 2].tolist() == [0, 10]
    assert (found[0, :, 1:] == numbers[0, 1:]).all()


def test_drawings_that_grow_thicker_follow_their_slider(images: Images) -> None:
    pixels = images.test.pixels[:2]
    growing = torch.stack([thickened(pixels, torch.full((2,), step / 10)) for step in range(11)], 1)
    found = readable_poses.followed(growing, 0, torch.tensor([1.0, -1.0]))
    assert found.tolist() == pytest.approx([1, -1])


def test_a_drawing_of_a_networks_own_numbers_is_its_reconstruction(images: Images) -> None:
    digits = images.test.first(5)
    for kind in readable_poses.KINDS:
        net = build(NetSpec(kind, "tiny")).eval()
        numbers = readable_poses.numbers_of(net, digits)
        with torch.no_grad():
            expected = net.decode(digits.pixels, digits.labels)
        torch.testing.assert_close(readable_poses.draw(net, numbers, digits.labels), expected)


def test_readable_poses_are_confirmed_for_the_side_with_the_better_numbers() -> None:
    def of(value: float) -> dict[str, np.ndarray]:
        return {
            "agreement": np.full((3, 50), value),
            "followed": np.full((3, 10), value),
            "kept": np.full((2, 10), 99.0),
            "chosen": np.arange(30).reshape(10, 3) // 27,
            "shown": np.zeros((3, readable_poses.STEPS, 28, 28)),
        }

    for ours, plain in ((0.9, 0.5), (0.5, 0.9)):
        found = readable_poses.evidence({"K3": [of(ours)] * 2, "C0r": [of(plain)] * 2}, of(0.3))
        assert bootstrap(found.comparisons[0], 50).mean == pytest.approx(ours - plain)
        assert bootstrap(found.comparisons[2], 50).mean == pytest.approx(ours - plain)
    assert found.figures["most frequent best number of the ten digits"]["K3"]["network 1"] == {
        name: "number 0 in 9 of 10 classes" for name in ATTRIBUTES
    }


def voting(strong: float, weak: float) -> CapsuleNet:
    """Return a network whose first fifth of capsules votes ``strong`` for class 0, and the others ``weak``."""
    net = build(NetSpec("K3", "tiny"))
    assert isinstance(net, CapsuleNet)
    first = round(routing_parts.DELETED_SHARE * net.config.primary_capsules)
    with torch.no_grad():
        net.weight.zero_()
        net.weight[:first, 0, 0, 0] = strong
        net.weight[first:, 0, 0, 0] = weak
        net.primary.weight.zero_()
        assert net.primary.bias is not None
        net.primary.bias.fill_(1.0)
    return net.eval()


@pytest.mark.parametrize(
    ("weak", "lost", "cosine"), [(0.0, 1.0, 0.0), (-6.0, 2.0, -1.0)], ids=["all is lost", "the pose is turned around"]
)
def test_a_deletion_tells_a_lost_pose_from_one_that_is_turned_around(weak: float, lost: float, cosine: float) -> None:
    net = voting(30.0, weak)
    images = torch.zeros(2, 1, 28, 28)
    with torch.no_grad():
        scores = routing_parts.scores_of_capsules(net, images)
        found = routing_parts.deleted(net, images, scores[:, 1])
    assert scores.shape == (2, 3, net.config.primary_capsules)
    assert found[0, 0] == pytest.approx(lost, abs=0.06) and found[0, 2] == pytest.approx(cosine, abs=1e-4)
    assert (found[0, 1] > 0.5) == (cosine < 0)  # the length does not tell a pose from its negative


def test_maps_correlate_with_themselves_and_not_with_an_even_one() -> None:
    one = uniform(28, 28).float().numpy()
    assert routing_parts.correlation(one, one) == pytest.approx(1)
    assert routing_parts.correlation(one, 3 - 2 * one) == pytest.approx(-1)
    assert routing_parts.correlation(one, np.ones((28, 28), np.float32)) == 0


def test_primary_capsules_with_one_parent_are_counted_and_dead_and_saturated_ones() -> None:
    largest = torch.tensor([[0.9, 0.1, 0.6, 0.2], [0.4, 0.1, 0.6, 0.2]])
    length = torch.tensor([[0.95, 0.01, 0.3, 0.99], [0.99, 0.02, 0.7, 0.2]])
    found = hierarchy.shares(largest, length)
    assert found["chosen"].tolist() == [50, 25] and found["present"].tolist() == [50, 50]
    assert (found["dead"].item(), found["saturated"].item()) == (25, 25)
    assert found["histogram"].sum() == pytest.approx(1)


def test_a_parse_tree_is_confirmed_where_most_parts_have_one_parent() -> None:
    many, few = (
        [hierarchy.shares(torch.full((30, 10), value), torch.full((30, 10), 0.9))] * 3 for value in (0.9, 0.12)
    )
    assert bootstrap(hierarchy.evidence(many).comparisons[0], 50).low == 50
    assert bootstrap(hierarchy.evidence(few).comparisons[0], 50).high == -50


@pytest.mark.parametrize(
    "row",
    [confidence, equivariance, readable_poses, routing_parts, hierarchy],
    ids=lambda one: str(one.CLAIM.title),
)
def test_a_row_is_measured_alike_twice(  # type: ignore[no-untyped-def]
    row, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = row.ROW.measure(bench)
    monkeypatch.setattr(row, "picture", lambda *_: b"")  # which takes most of the time
    second = row.ROW.measure(replace(bench, store=Untrained(tmp_path / "again")))
    assert {job.kind for job in row.ROW.jobs(bench.scale)} and first.said and first.figures
    assert words_of(first) == words_of(row.CLAIM.number)
    assert all(picture.startswith(b"\x89PNG") for picture in first.pictures.values()) and first.pictures
    for one, other in zip(first.comparisons, second.comparisons, strict=True):
        assert isinstance(one, Comparison) and len(one.a) == len(bench.seeds)
        np.testing.assert_array_equal(one.a, other.a)
        np.testing.assert_array_equal(one.b, other.b)
    assert first.figures == second.figures
