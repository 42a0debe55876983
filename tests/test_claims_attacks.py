"""Tests of the attacks on the claims' networks, and of the rows that report them."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from serving.files.idx import read_idx
from tests.claims_report import words_of
from tests.conftest import DATA
from training.claims import toolboxes
from training.claims.attacks import (
    Pursuit,
    by_own_loss,
    by_rival,
    every_pixel,
    fgsm,
    fooled_by,
    fooling,
    log_odds,
    open_scores,
    pgd,
    rivalries,
    still,
    unending,
)
from training.claims.bench import Bench
from training.claims.detectors import DETECTORS, FALSE_ALARMS, Detector, closeness, detectors, evading
from training.claims.effort import BOUNDS, EFFORTS, KINDS, Effort, sample
from training.claims.evidence import Verdict, bootstrap, judge
from training.claims.images import Images, Labelled
from training.claims.jobs import SCALES
from training.claims.nets import CapsuleNet, NetSpec, PlainNet, build
from training.claims.rows import detection, one_pixel, white_box
from training.claims.rows.white_box import ATTACKS, CLAIM, SIMPLE, Case
from training.claims.store import Store, round_weights

EFFORT = Effort(white_box=6, one_pixel=1, detection=4, steps=4, restarts=1)
ROUNDING = 1e-6
Net = CapsuleNet | PlainNet


@pytest.fixture(scope="module")
def digits() -> Labelled:
    images, labels = (
        torch.from_numpy(read_idx((DATA / f"t10k-{name}.gz").read_bytes()))
        for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    return Labelled(images[:, None], labels.to(torch.int64))


@pytest.fixture(scope="module")
def nets(digits: Labelled) -> dict[str, Net]:
    """Return a tiny network of each kind. Two have learned most digits; the other kinds have the same weights."""
    nets: dict[str, Net] = {}
    for kind, other in (("K3", "K1"), ("C0r", "C0")):
        nets[kind] = learned(kind, digits)
        nets[other] = build(NetSpec(other, "tiny")).requires_grad_(False).eval()
        nets[other].load_state_dict(nets[kind].state_dict(), strict=False)
    return nets


def learned(kind: str, digits: Labelled) -> Net:
    torch.manual_seed(1)
    net = build(NetSpec(kind, "tiny"))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for start in range(0, 40 * 32, 32):
        part = slice(start, start + 32)
        images = digits.images[part].float() / 255
        loss = net.loss(images, images.unsqueeze(1), digits.labels[part].unsqueeze(1), 0.0005)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    round_weights(net)
    return net.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def few(digits: Labelled) -> tuple[Tensor, Tensor]:
    """Return digits that no network has learned from: pixels and labels."""
    return digits.images[-24:].float() / 255, digits.labels[-24:]


@pytest.mark.parametrize("kind", ["K3", "C0"])
@pytest.mark.parametrize("pursuit", [by_own_loss, by_rival])
def test_an_attack_stays_within_its_bound_and_within_the_pixels(
    nets: dict[str, Net], few: tuple[Tensor, Tensor], kind: str, pursuit: Callable[[Net], Pursuit]
) -> None:
    images, labels = few
    aim = pursuit(nets[kind])
    for attacked in (fgsm(aim, images, labels, 0.2), pgd(aim, images, labels, 0.2, 1, steps=5, restarts=2)):
        assert (attacked.images - images).abs().max() <= 0.2 + ROUNDING
        assert attacked.images.min() >= 0
        assert attacked.images.max() <= 1
        assert (attacked.images != images).any()


@pytest.mark.parametrize("kind", ["K3", "C0"])
def test_an_image_that_was_reached_gets_a_wrong_answer(
    nets: dict[str, Net], few: tuple[Tensor, Tensor], kind: str
) -> None:
    images, labels = few
    scores = open_scores(nets[kind])
    attacked = pgd(by_rival(nets[kind]), images, labels, 0.1, 1, steps=5, restarts=2)
    assert torch.equal(fooled_by(scores(attacked.images), labels), attacked.reached)
    assert attacked.reached.sum() > 0


@pytest.mark.parametrize("kind", ["K3", "C0"])
def test_many_small_steps_reach_at_least_as_much_as_one_large_step(
    nets: dict[str, Net], few: tuple[Tensor, Tensor], kind: str
) -> None:
    images, labels = few
    aim = by_rival(nets[kind])
    for bound in (0.05, 0.1):
        one, many = fgsm(aim, images, labels, bound), pgd(aim, images, labels, bound, 1, steps=10, restarts=1)
        assert many.reached.sum() >= one.reached.sum()
    clean = fooled_by(open_scores(nets[kind])(images), labels)
    assert clean.float().mean() < 0.5 < many.reached.float().mean()


def test_an_image_that_is_wrong_before_the_attack_counts_and_stays_as_it_is(
    nets: dict[str, Net], few: tuple[Tensor, Tensor]
) -> None:
    images, labels = few
    others = (labels + 1) % 10
    wrong = fooled_by(nets["K3"].scores(images), others)
    attacked = pgd(by_rival(nets["K3"]), images, others, 0.1, 1, steps=2, restarts=1)
    assert wrong.float().mean() > 0.5
    assert attacked.reached[wrong].all()
    assert torch.equal(attacked.images[wrong], images[wrong])


def test_the_same_seed_gives_the_same_images_and_another_seed_others(
    nets: dict[str, Net], few: tuple[Tensor, Tensor]
) -> None:
    images, labels = few
    first, again, other = (pgd(by_rival(nets["K3"]), images, labels, 0.02, seed, 3, 1).images for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_attacker_who_never_stops_returns_the_largest_value_on_the_way(
    nets: dict[str, Net], few: tuple[Tensor, Tensor]
) -> None:
    images, labels = few
    aim = by_rival(nets["K3"])
    stopped = pgd(aim, images, labels, 0.1, 1, steps=10, restarts=1)
    unstopped = pgd(unending(aim), images, labels, 0.1, 1, steps=10, restarts=1)
    values, stopped_values = aim(unstopped.images, labels)[0], aim(stopped.images, labels)[0]
    assert not unstopped.reached.any()
    assert values[stopped.reached].mean() > stopped_values[stopped.reached].mean()


def test_the_log_odds_are_arctanh_and_finite_at_both_ends() -> None:
    lengths = torch.tensor([[0.1, 0.5, 0.9]])
    assert torch.allclose(log_odds(lengths), torch.atanh(2 * lengths - 1))
    assert torch.allclose(log_odds(lengths), torch.logit(lengths) / 2)
    assert torch.isfinite(log_odds(torch.tensor([[0.0, 1.0]]))).all()


def test_the_gradient_of_the_margin_runs_through_all_iterations_of_routing(
    nets: dict[str, Net], few: tuple[Tensor, Tensor]
) -> None:
    """Compare it with the difference of values on both sides, which no cut in the gradient can reach."""
    net, (images, labels) = nets["K3"], few
    assert isinstance(net, CapsuleNet)
    pixels = images[:4].clone().requires_grad_()
    (slope,) = torch.autograd.grad(by_rival(net)(pixels, labels[:4])[0].sum(), pixels)
    direction = slope / slope.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    above, below = (by_rival(net)(images[:4] + side * 2e-3 * direction, labels[:4])[0] for side in (1, -1))
    assert torch.allclose((above - below) / 4e-3, slope.flatten(1).norm(dim=1), rtol=0.05)


class Sure(nn.Module):
    """A network of bands: the class whose band of rows is brightest, with lengths above 0.9 and below 0.1."""

    decoder = None

    def scores(self, images: Tensor) -> Tensor:
        return torch.sigmoid(2 * bands(images))


class SurePlain(PlainNet):
    """The same answers by logits."""

    def __init__(self) -> None:
        super().__init__(NetSpec("C0", "tiny"))

    def logits(self, images: Tensor) -> Tensor:
        return bands(images)


def bands(images: Tensor) -> Tensor:
    """Return log-odds between -3 and 3, (B, 10), that grow with the brightness of each two rows."""
    return 30 * (images[:, 0, :20].reshape(-1, 10, 2 * 28).mean(2) - 0.5)


@pytest.fixture
def banded() -> tuple[Tensor, Tensor]:
    """Return images of one brighter band, and its number."""
    labels = torch.arange(10).repeat(2)
    images = torch.full((20, 1, 28, 28), 0.42)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 2 * label : 2 * label + 2] = 0.58
    return images, labels


def test_the_gradient_of_the_margin_loss_is_exactly_zero_where_a_network_is_sure(
    banded: tuple[Tensor, Tensor],
) -> None:
    sure = Sure()
    assert still(by_own_loss(sure), *banded).all()  # type: ignore[arg-type]
    assert not still(by_rival(sure), *banded).any()  # type: ignore[arg-type]
    images, labels = banded
    unmoved = fgsm(by_own_loss(sure), images, labels, 0.1)  # type: ignore[arg-type]
    assert torch.equal(unmoved.images, images)
    assert not unmoved.reached.any()


def hide_toolboxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the toolboxes' attacks change nothing, so that the test needs none."""
    for name in ("ddn", "apgd", "square"):
        monkeypatch.setattr(white_box, name, lambda scores, images, *_, **__: images)


def test_by_the_simple_attack_alone_the_report_would_have_lied_and_says_so(
    banded: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two networks that answer the same: all that differs is the loss that the simple attack follows."""
    hide_toolboxes(monkeypatch)
    images, labels = banded
    nets = {"K3": Sure(), "K1": Sure(), "C0": SurePlain(), "C0r": SurePlain()}
    found = {
        kind: [
            white_box.attack(Case(net, images, labels, EFFORT, seed), lambda _: None)  # type: ignore[arg-type]
            for seed in (1,)
        ]
        for kind, net in nets.items()
    }
    evidence = white_box.evidence(found, labels, resamples=200)
    honest = judge(bootstrap(evidence.comparisons[0], 200), CLAIM.enough)
    assert honest == Verdict.NOT_CONFIRMED
    assert evidence.comparisons[0].a.mean() == evidence.comparisons[0].b.mean() == 0

    simple = {
        kind: [{**one, **{name: one[SIMPLE] for name in (*ATTACKS, *white_box.FURTHER)}} for one in seeds]
        for kind, seeds in found.items()
    }
    replaced = white_box.evidence(simple, labels, resamples=200)
    assert judge(bootstrap(replaced.comparisons[0], 200), CLAIM.enough) == Verdict.CONFIRMED
    assert replaced.comparisons[0].a.mean() == 100

    assert "lied: it would have said CONFIRMED" in evidence.said
    assert evidence.figures["verdict of FGSM on the loss alone"] == "CONFIRMED"
    assert "lied" not in replaced.said


def test_an_image_that_falls_to_a_small_change_falls_to_a_larger_one() -> None:
    fell = np.array([[True, False], [False, False], [False, True]])
    found = [{name: fell if name == SIMPLE else np.zeros_like(fell) for name in (*ATTACKS, *white_box.FURTHER)}]
    assert white_box.standing(found)[0].tolist() == [[0, 100], [0, 100], [0, 0]]
    assert white_box.right(found, BOUNDS[1]).tolist() == [[0, 100]]
    assert white_box.standing(found, ["APGD"]).all()


def test_every_pixel_is_tried_black_and_white(nets: dict[str, Net], few: tuple[Tensor, Tensor]) -> None:
    images, labels = few[0][:2], few[1][:2]
    scores = nets["C0"].scores
    search = every_pixel(scores, images, labels)
    assert search.tried.tolist() == [784 * 2] * 2
    assert ((search.images != images).flatten(1).sum(1) <= 1).all()
    for image, label, worst, turned in zip(images, labels, search.images, search.turned, strict=True):
        changed = image.repeat(784 * 2, 1, 1, 1)
        for place in range(784):
            for value in (0, 1):
                changed[place * 2 + value].view(-1)[place] = value
        answers = scores(changed)
        assert turned == fooled_by(answers, label.expand(784 * 2)).sum()
        hardest = rivalries(answers, label.expand(784 * 2)).max()
        assert torch.isclose(rivalries(scores(worst[None]), label[None])[0], hardest, atol=1e-5)


def test_a_single_pixel_that_turns_the_answer_is_found() -> None:
    """The answer of this network hangs on the pixel 5, 7 alone."""

    def scores(images: Tensor) -> Tensor:
        return torch.stack([1 - images[:, 0, 5, 7], images[:, 0, 5, 7]], 1)

    search = every_pixel(scores, torch.zeros(1, 1, 28, 28), torch.tensor([0]))
    assert search.turned.tolist() == [1]
    assert search.images[0, 0, 5, 7] == 1
    assert search.images.sum() == 1


def test_a_pixel_of_a_colour_image_changes_in_all_channels() -> None:
    search = every_pixel(lambda images: images.mean((2, 3))[:, :2], torch.zeros(1, 3, 4, 5), torch.tensor([0]))
    assert search.tried.tolist() == [2 * 20]
    changed = search.images[0].sum(0)
    assert set(changed.flatten().tolist()) <= {0.0, 3.0}


def test_a_detector_flags_its_share_of_ordinary_images(nets: dict[str, Net], digits: Labelled) -> None:
    net = nets["K3"]
    ordinary = digits.images[3000:3200].float() / 255
    assert set(detectors(net)) == {"reconstruction", "margin", "length"}
    assert set(detectors(nets["C0"])) == {"margin", "length"}
    for suspicion in detectors(net).values():
        detector = Detector.fitted(suspicion, net, ordinary)
        assert detector.flags(net, ordinary).float().mean() == pytest.approx(FALSE_ALARMS, abs=0.01)


def test_an_attacker_who_knows_the_detector_passes_it(
    nets: dict[str, Net], digits: Labelled, few: tuple[Tensor, Tensor]
) -> None:
    net, (images, labels) = nets["K3"], few
    detector = Detector.fitted(closeness, net, digits.images[3000:3200].float() / 255)
    attacked = pgd(evading(net, detector), images, labels, 0.3, 1, steps=10, restarts=1)
    assert (attacked.images - images).abs().max() <= 0.3 + ROUNDING
    wrong = fooled_by(net.scores(attacked.images), labels)
    assert torch.equal(attacked.reached, wrong & ~detector.flags(net, attacked.images))
    near = pgd(by_rival(net), images, labels, 0.3, 1, steps=10, restarts=1)
    assert attacked.reached.sum() > (near.reached & ~detector.flags(net, near.images)).sum()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, nets: dict[str, Net], digits: Labelled) -> Bench:
    """Return a bench with these networks as those of a run."""
    scale = replace(SCALES["quick"], seeds=(1,), resamples=100)
    store = Store(tmp_path_factory.mktemp("claims"))
    for kind, net in nets.items():
        for job in scale.base([kind]):
            store.write(job, net, {}, {})
    test = Labelled(digits.images[-48:], digits.labels[-48:])
    held_out = Labelled(digits.images[3000:3200], digits.labels[3000:3200])
    return Bench(scale, store, Images(held_out, held_out, test, test, test))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EFFORTS, "quick", EFFORT)


def test_the_rows_measure_networks_and_judge_them(bench: Bench, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_toolboxes(monkeypatch)
    monkeypatch.setattr(white_box, "check_toolboxes", lambda: None)
    for row in (white_box.ROW, one_pixel.ROW, detection.ROW):
        first, again = row.measure(bench), row.measure(bench)  # the second time from the files
        assert row.jobs(bench.scale) == bench.scale.base(KINDS)
        assert words_of(first) == words_of(row.claim.number)
        assert first.figures == again.figures
        assert first.said == again.said
        for comparison in first.comparisons:
            judge(bootstrap(comparison, bench.scale.resamples), row.claim.enough)
        assert all(picture.startswith(b"\x89PNG") for picture in first.pictures.values())


def invented(strong: bool) -> dict[str, np.ndarray]:
    """Return what all three rows of attacks would have stored of a network that withstands them, or falls to all."""
    fell = np.full((len(BOUNDS), 20), not strong)
    found = {name: fell for name in (*ATTACKS, *white_box.FURTHER, "fooled")}
    for name in DETECTORS:
        found |= {f"{name}: {who}": fell for who in (detection.UNAWARE, detection.AWARE)}
        found[f"{name}: alarms"] = np.array(0.05)
    firm = {"right": np.ones(20, bool), "turned": np.full(20, 0 if strong else 9), "tried": np.full(20, 1568)}
    shown = {"images": np.zeros((20, 28, 28)), "examples": np.zeros((8, 28, 28)), "answers": np.zeros(20, int)}
    return found | firm | shown | {"wrong": fell[0], "still": fell[0], "distance": np.ones(20)}


@pytest.mark.parametrize(("row", "rival"), [(white_box, "C0"), (one_pixel, "C0"), (detection, "C0r")])
def test_swapping_the_capsule_network_with_its_rival_flips_the_verdict_on_an_attack(
    row: ModuleType, rival: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.claims.drawing.png", lambda figure: b"png")
    labels = torch.zeros(20, dtype=torch.int64)
    rest = {white_box: (labels, 100), one_pixel: (labels.numpy(),), detection: ()}[row]

    def verdict(strong: str) -> Verdict:
        found = {kind: [invented(kind == strong)] * 2 for kind in KINDS}
        return judge(bootstrap(row.evidence(found, *rest).comparisons[0], 100), row.CLAIM.enough)

    assert (verdict("K3"), verdict(rival)) == (Verdict.CONFIRMED, Verdict.NOT_CONFIRMED)


def test_the_same_seed_gives_the_same_figures(bench: Bench, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_toolboxes(monkeypatch)
    images, labels = sample(bench, EFFORT.white_box)
    net = bench.net(bench.base("K3", 1))
    first, again = (white_box.attack(Case(net, images, labels, EFFORT, 1), lambda _: None) for _ in range(2))
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_the_attacker_who_knows_is_never_the_weaker_one(bench: Bench, small: None) -> None:
    detection.ROW.measure(bench)
    for kind in KINDS:
        found = bench.kept(f"detection-{kind}-1", dict)
        for name in found:
            if name.endswith(detection.UNAWARE):
                aware = found[name.replace(detection.UNAWARE, detection.AWARE)]
                assert (aware >= found[name]).all()
                assert (found["fooled"] >= found[name]).all()


def test_a_missing_toolbox_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    monkeypatch.setitem(sys.modules, "art", None)
    with pytest.raises(
        toolboxes.MissingToolboxError, match=r"adversarial-robustness-toolbox .*capsnet-serving\[claims\]"
    ):
        white_box.ROW.measure(bench)


@pytest.mark.filterwarnings("ignore")  # of the toolboxes' own code
def test_the_attacks_of_the_toolboxes_stay_within_their_bounds_and_repeat(
    nets: dict[str, Net], few: tuple[Tensor, Tensor]
) -> None:
    pytest.importorskip("art")
    pytest.importorskip("foolbox")
    images, labels = few[0][:12], few[1][:12]
    scores = open_scores(nets["K3"])
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    attacks: dict[str, Callable[[], Tensor]] = {
        "APGD": lambda: toolboxes.apgd(scores, images, labels, 0.2, 1, steps=5, restarts=1),
        "Square": lambda: toolboxes.square(scores, images, labels, 0.2, 1, queries=10),
        "DDN": lambda: toolboxes.ddn(scores, images, labels, 1, steps=40),
    }
    for name, attack in attacks.items():
        changed = attack()
        assert torch.equal(changed, attack()), name
        assert changed.min() >= 0
        assert changed.max() <= 1
        if name != "DDN":
            assert (changed - images).abs().max() <= 0.2 + ROUNDING
    assert fooled_by(scores(changed), labels).float().mean() > 0.5
    assert np.random.get_state()[1].tolist() == before[0]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_pursuit_without_a_slope_leaves_the_images_at_their_start(banded: tuple[Tensor, Tensor]) -> None:
    images, labels = banded
    aim = fooling(lambda pixels: bands(pixels) * 0 + nn.functional.one_hot(labels, 10), rivalries)
    attacked = pgd(aim, images[:20], labels, 0.1, 1, steps=5, restarts=1)
    assert not attacked.reached.any()
    assert torch.equal(attacked.images, images)
