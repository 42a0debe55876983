"""Tests of the claims: networks of equal size, repeatable trainings, verdicts computed from outcomes, the report."""

import csv
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.claims_report import DOCS, words_of
from tests.conftest import ROOT
from tests.trainings import process_state
from training.claims import rewrite, run
from training.claims.__main__ import main
from training.claims.bench import Bench
from training.claims.evidence import Comparison, Evidence, Interval, Verdict, bootstrap, judge
from training.claims.images import Images, Labelled, load_images
from training.claims.jobs import BACKGROUND, DIGITS, ONE_CLASS, PAIRS, PAPER, PAPER_SIZE, PLACED, SCALES, SHAPES, Job
from training.claims.learn import Workshop, train
from training.claims.nets import KINDS, SIZES, CapsuleNet, NetSpec, PlainNet, build, parameters
from training.claims.report import (
    COMPARISONS_FILE,
    HTML_FILE,
    JSON_FILE,
    MARKDOWN_FILE,
    OUTCOMES,
    RUNS_FILE,
    write_report,
)
from training.claims.results import Omission, Result, read_result, write_omission, write_result
from training.claims.rows import rows
from training.claims.run import Settings, jobs_of
from training.claims.scoring import DISTANCES, DivergedError, Sets, scores
from training.claims.store import DamagedRunError, Store, alone_in, round_weights, spec_of
from training.claims.streams import CHUNK_STEPS, ONE_CLASS_DIGIT, stream
from training.claims.summary import NOT_RUN, collect
from training.data.datasets import Dataset, load
from training.data.sources import DatasetError
from training.data.specs import NONE
from training.recorded.learner import on_device

__all__ = ["process_state"]

SCORED_ROWS = (1, 4, 5, 6, 10, 14, 15, 16)  # measured from stored answers, and not from weights
TINY = replace(
    SCALES["quick"],
    steps={DIGITS: 3, PLACED: 3, PAIRS: 3, BACKGROUND: 3, ONE_CLASS: 3, "few": 3},
    train=60,
    held_out=20,
    test=60,
    pairs=60,
    batch=4,
    pair_batch=4,
    resamples=200,
)


def labelled(count: int, seed: int) -> Labelled:
    source = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 4:24, 6:22] = torch.randint(256, (count, 1, 20, 16), dtype=torch.uint8, generator=source)
    return Labelled(images, torch.arange(count) % 10)


IMAGES = Images(labelled(60, 1), labelled(20, 2), labelled(60, 3), labelled(60, 4), labelled(60, 5))


def no_files(*_: object, **__: object) -> None:
    raise DatasetError("no source has the files; give --data-dir FOLDER")


def test_a_quick_run_without_network_takes_the_clones_digits_and_a_full_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.claims.images.load", no_files)
    images = load_images(TINY)
    digits = {one.numpy().tobytes() for one in images.test.images}
    assert [len(images.train), len(images.held_out), len(images.test), len(images.other_test)] == [60, 20, 60, 60]
    assert not any(one.numpy().tobytes() in digits for one in (*images.train.images, *images.held_out.images))
    assert not any(one.numpy().tobytes() in digits for one in images.other_test.images)
    assert "mnist is not available; this quick run takes digits of the clone instead" in capsys.readouterr().err
    with pytest.raises(DatasetError):
        load_images(SCALES["full"])
    monkeypatch.setattr(
        "training.claims.images.load",
        lambda name, *_, **__: digits_or_load(name, None) if name == "mnist" else no_files(),
    )
    with pytest.raises(DatasetError, match="give --clothes-dir FOLDER"):
        load_images(SCALES["full"])


@pytest.mark.parametrize("flag", ["--data-dir", "--clothes-dir"])
def test_a_folder_without_the_files_is_an_error_also_in_a_quick_run(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if flag == "--clothes-dir":
        monkeypatch.setattr("training.claims.images.load", lambda name, folder, *_, **__: digits_or_load(name, folder))
    assert main(["quick", "--out", str(tmp_path / "run"), flag, str(tmp_path / "wrong")]) == 1
    name = "mnist" if flag == "--data-dir" else "fashion-mnist"
    reason = f"the folder {tmp_path / 'wrong'} does not have the data set {name}: there is no such folder; expected "
    assert reason in capsys.readouterr().err


def digits_or_load(name: str, folder: Path | None) -> Dataset:
    """Return digits for MNIST, and load another data set."""
    if name != "mnist":
        return load(name, folder, progress=False)
    train, test = (one.first(60) for one in (IMAGES.train, IMAGES.test))
    return Dataset(name, tuple("0123456789"), train.images, train.labels, test.images, test.labels)


def shop(folder: Path, **changes: Any) -> Workshop:
    told = {"say": lambda _: None, **changes}
    return Workshop(Store(folder), IMAGES, TINY, torch.device("cpu"), **told)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("images", SHAPES)
def test_a_plain_network_is_as_large_as_the_capsule_network(size: str, images: str) -> None:
    capsules, plain = (parameters(build(NetSpec(kind, size, *SHAPES[images]))) for kind in ("K3", "C0"))
    assert abs(plain / capsules - 1) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_every_network_scores_describes_and_learns_and_draws_if_it_has_a_decoder(kind: str) -> None:
    net = build(NetSpec(kind, "tiny"))
    images, labels = torch.rand(3, 1, 28, 28), torch.tensor([[1], [2], [NONE]])
    found = net.scores(images)
    assert found.shape == (3, 10) and (found >= 0).all() and (found <= 1).all()
    assert net.features(images).ndim == 2
    assert torch.isfinite(net.loss(images, images[:, None], labels, 0.0005))
    if KINDS[kind][1]:
        assert net.decode(images, torch.tensor([1, 2, 3])).shape == images.shape
        assert not torch.equal(net.decode(images, torch.tensor([1, 2, 3])), net.decode(images, torch.tensor([3, 2, 1])))
    else:
        with pytest.raises(ValueError, match="no decoder"):
            net.decode(images, torch.tensor([1, 2, 3]))


def test_the_papers_plain_network_has_the_papers_number_of_parameters() -> None:
    with torch.device("meta"):
        net = build(NetSpec(PAPER, PAPER_SIZE))
    convolutions = 25 * 256 + 256 + 25 * 256 * 256 + 256 + 25 * 256 * 128 + 128
    layers = 28 * 28 * 128 * 328 + 328 + 328 * 192 + 192 + 192 * 10 + 10
    assert parameters(net) == convolutions + layers == 35_445_522
    assert net.features(torch.zeros(2, 1, 28, 28, device="meta")).shape == (2, 192)


def test_the_papers_plain_network_learns_with_dropout_and_has_no_decoder() -> None:
    torch.manual_seed(0)
    net, images, labels = build(NetSpec(PAPER, "tiny")), torch.rand(3, 1, 28, 28), torch.tensor([[1], [2], [3]])
    before = net.loss(images, images[:, None], labels, 0.0005)
    assert before != net.loss(images, images[:, None], labels, 0.0005)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net.eval()
    before = net.loss(images, images[:, None], labels, 0.0005)
    before.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert net.loss(images, images[:, None], labels, 0.0005) < before
    assert torch.equal(net.scores(images), net.scores(images))
    with pytest.raises(ValueError, match="no decoder"):
        net.decode(images, torch.tensor([1, 2, 3]))


def test_the_interval_of_paired_outcomes_is_narrow_and_grows_with_the_spread_of_the_seeds() -> None:
    source = np.random.default_rng(0)
    right = (source.random((3, 4000)) < 0.9).astype(float)
    better = np.maximum(right, source.random((3, 4000)) < 0.1)
    paired = bootstrap(Comparison("paired", "K3", "C0", better, right), 400)
    assert 0.003 < paired.low < paired.mean < paired.high < 0.02
    unpaired = bootstrap(Comparison("unpaired", "K3", "C0", better, source.permuted(right, axis=1)), 400)
    assert unpaired.high - unpaired.low > 1.5 * (paired.high - paired.low)
    lucky = better.copy()
    lucky[0] = 0
    spread = bootstrap(Comparison("one bad seed", "K3", "C0", lucky, right), 400)
    assert spread.low < -0.5 < spread.high
    same = bootstrap(Comparison("same", "K3", "C0", right, right), 100)
    assert same == Interval(0, 0, 0)


def test_outcomes_of_other_shapes_or_without_a_number_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        Comparison("x", "K3", "C0", np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="not finite"):
        Comparison("x", "K3", "C0", np.full((2, 3), np.nan), np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        (Interval(1.0, 0.5, 1.5), Verdict.CONFIRMED),
        (Interval(0.4, 0.1, 0.7), Verdict.WEAKER),
        (Interval(0.9, -0.1, 1.9), Verdict.NOT_CONFIRMED),
        (Interval(-1.0, -1.5, -0.5), Verdict.NOT_CONFIRMED),
    ],
)
def test_a_verdict_follows_from_the_interval(interval: Interval, verdict: Verdict) -> None:
    assert judge(interval, 0.5) is verdict


@pytest.mark.parametrize("images", SHAPES)
def test_networks_of_one_seed_see_the_same_images_of_the_right_shape(images: str) -> None:
    jobs = [Job(kind, 1, 3, images, "tiny", batch=4) for kind in ("K3", "C0")]
    first, second = (stream(job, IMAGES)() for job in jobs)
    side, channels, _ = SHAPES[images]
    assert first.images.shape == (CHUNK_STEPS, 4, channels, side, side) and first.images.dtype == torch.uint8
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first.images, stream(replace(jobs[0], seed=2), IMAGES)().images)


def test_half_the_images_of_one_class_show_it() -> None:
    chunk = stream(Job("K3", 1, 3, ONE_CLASS, "tiny", batch=4), IMAGES)()
    assert sorted(chunk.labels[0, :, 0].tolist()) == [NONE, NONE, 0, 0]


def test_few_images_of_each_class_are_drawn_again_and_again() -> None:
    chunk = stream(Job("K3", 1, 3, PLACED, "tiny", per_class=1, batch=4), IMAGES)()
    of_class = chunk.images[chunk.labels[..., 0] == ONE_CLASS_DIGIT]
    inks = {int(one.long().sum()) for one in of_class}  # the same digit at other places
    assert len(of_class) > 1 and len(inks) == 1


def test_two_equal_digits_move_apart() -> None:
    scenes, labels = Sets(IMAGES, TINY).crowded
    assert scenes.shape == (len(DISTANCES), 60, 1, 40, 40) and len(labels) == 60
    columns = [(scene[0, 0] > 0).any(0).nonzero().flatten() for scene in scenes]
    widths = [int(one[-1] - one[0]) for one in columns]
    assert [other - one for one, other in pairwise(widths)] == [2] * (len(DISTANCES) - 1)


@pytest.mark.training
def test_a_second_training_gives_the_same_files_alone_or_beside_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [
        Job(kind, 1, 3, images, "tiny", batch=4, keep=True) for images in (DIGITS, PLACED) for kind in ("K3", "C0r")
    ]
    jobs.insert(1, Job(PAPER, 1, 3, DIGITS, "tiny", batch=4, keep=True))
    assert train(jobs, shop(tmp_path / "alone")) == []
    monkeypatch.setattr("training.claims.learn.AT_ONCE_ON_CPU", 4)
    assert train(reversed(jobs), shop(tmp_path / "beside")) == []
    for job in jobs:
        one, other = (tmp_path / name / "runs" / job.name for name in ("alone", "beside"))
        assert (one / "weights.safetensors").read_bytes() == (other / "weights.safetensors").read_bytes()
        for file in one.glob("*.npz"):
            assert file.read_bytes() == (other / file.name).read_bytes(), file


@pytest.mark.training
def test_a_finished_network_is_not_trained_again_and_its_weights_give_its_scores(tmp_path: Path) -> None:
    job = Job("K3", 1, 3, DIGITS, "tiny", batch=4, keep=True)
    done: list[int] = []
    place = shop(tmp_path, done=lambda: done.append(1))
    assert train([job, job], place) == [] and len(done) == 1
    assert train([job], place) == [] and len(done) == 1
    net = on_device(Bench(TINY, place.store, IMAGES).net(job), torch.device("cpu"))  # sums in the training's order
    found = scores(net, IMAGES.test.images)
    stored = place.store.arrays(job, "test")["scores"]
    assert np.array_equal(found.half().numpy(), stored)


def test_a_kept_measurement_is_made_once_and_its_time_counts_in_later_runs(tmp_path: Path) -> None:
    made: list[int] = []

    def compute() -> dict[str, Any]:
        made.append(1)
        return {"a": np.arange(3)}

    benches = [Bench(TINY, Store(tmp_path), IMAGES) for _ in range(2)]
    for bench in benches:
        found = bench.kept("row-K3-1", compute)
        assert list(found) == ["a"] and found["a"].tolist() == [0, 1, 2]
    assert len(made) == 1
    assert benches[0].earlier == [0.0] and benches[1].earlier[0] > 0


@pytest.mark.training
def test_a_network_whose_scores_are_not_finite_is_not_stored_and_those_beside_it_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.claims.learn.AT_ONCE_ON_CPU", 3)

    def made(spec: NetSpec) -> CapsuleNet | PlainNet:
        net = build(spec)
        if spec.kind == "C0":
            next(net.parameters()).data.fill_(torch.nan)
        return net

    monkeypatch.setattr("training.claims.learn.build", made)
    said: list[str] = []
    for images in (DIGITS, PLACED):
        jobs = [Job(kind, 1, 3, images, "tiny", batch=4) for kind in ("K3", "C0", "C0r")]
        place = shop(tmp_path, say=said.append)
        assert train(jobs, place) == [jobs[1]]
        assert [place.store.finished(job) for job in jobs] == [True, False, True]
        assert any(one.startswith(f"{jobs[1].name} is not stored: ") and "not finite" in one for one in said)


def test_scores_that_are_not_finite_are_an_error() -> None:
    net = build(NetSpec("C0", "tiny")).eval()
    next(net.parameters()).data.fill_(torch.nan)
    with pytest.raises(DivergedError, match="600 of 600 scores are not finite"):
        scores(net, IMAGES.test.images)


def test_no_training_begins_after_the_deadline(tmp_path: Path) -> None:
    job = Job("K3", 1, 3, DIGITS, "tiny", batch=4)
    assert train([job], shop(tmp_path, deadline=0.0)) == [job]
    assert not (tmp_path / "runs").exists()


def invented(job: Job, wrong_share: float) -> dict[str, dict[str, Any]]:
    """Return arrays as a network would have stored them that gives this share of wrong answers."""
    test = IMAGES.test.labels.numpy()
    source = np.random.default_rng([job.seed, len(job.kind)])

    def answer(labels: np.ndarray) -> np.ndarray:
        return np.where(source.random(labels.shape) < wrong_share, (labels + 1) % 10, labels).astype(np.uint8)

    distances, pairs = len(DISTANCES), np.stack([test, (test + 3) % 10], 1)
    present = test == ONE_CLASS_DIGIT
    return {
        "test": {"answers": answer(test)[:, None], "scores": 1.0 * (present ^ (source.random(60) < wrong_share))},
        "affine": {
            "steps": np.arange(2),
            "held_out": np.array([0.5, 0.1]),
            "answers": np.stack([answer(test), answer(test)]),
        },
        "crowding": {
            "answers": np.stack([answer(test) for _ in range(distances)]),
            "scores": np.full((distances, 60), 0.5),
            "explained": np.full((distances, 60), 1 - wrong_share),
        },
        "pairs": {
            "answers": answer(pairs),
            "labels": pairs.astype(np.uint8),
            "overlap": np.full((60, 2), 1 - wrong_share),
        },
        "noise": {"answers": answer(test)[:, None], "scores": (source.random(60) < wrong_share).astype(float)},
        "clothes": {"answers": answer(test)[:, None], "scores": (source.random(60) < wrong_share).astype(float)},
    }


@pytest.fixture
def invented_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A run in which K3 is much better than all others. Its pictures are not encoded, which takes most of the time."""
    monkeypatch.setattr("training.claims.drawing.png", lambda figure: figure.get_suptitle().encode())
    store = Store(tmp_path / "run")
    for job in jobs_of([row for row in rows() if row.claim.number in SCORED_ROWS], TINY, gpu=False):
        write_invented(store, job)
    return Bench(TINY, store, IMAGES)


def write_invented(store: Store, job: Job) -> None:
    arrays = invented(job, 0.02 if job.kind == "K3" else 0.6)
    needed = {"test", "affine", "crowding", "pairs", "noise", "clothes"}
    net = build(spec_of(job))
    round_weights(net)
    figures = {"parameters": 1234, "seconds": 1.0, "device": "a device", "torch": "2", "commit": "abc"}
    store.write(job, net, {name: arrays[name] for name in needed}, figures)


def swap_scores(store: Store) -> None:
    """Swap what was stored of K3 and of C0."""
    for mine in list((store.folder / "runs").glob("*-K3-*/*.npz")):
        other = mine.parent.with_name(mine.parent.name.replace("-K3-", "-C0-")) / mine.name
        if other.exists():
            kept = mine.read_bytes()
            mine.write_bytes(other.read_bytes())
            other.write_bytes(kept)


def verdicts(bench: Bench) -> dict[int, Verdict]:
    return {
        row.claim.number: judge(bootstrap(row.measure(bench).comparisons[0], TINY.resamples), row.claim.enough)
        for row in rows()
        if row.claim.number in SCORED_ROWS
    }


def test_swapping_what_capsules_and_plain_networks_answered_flips_every_verdict(invented_run: Bench) -> None:
    before = verdicts(invented_run)
    assert before == verdicts(invented_run), "the same data give the same verdicts"
    swap_scores(invented_run.store)
    after = verdicts(invented_run)
    weaknesses = (14, 15)
    assert {number for number, verdict in before.items() if verdict is Verdict.NOT_CONFIRMED} == set(weaknesses)
    assert {number for number, verdict in after.items() if verdict is not Verdict.NOT_CONFIRMED} == set(weaknesses)


def test_a_row_tells_the_same_each_time_it_is_measured(invented_run: Bench) -> None:
    for row in rows():
        if row.claim.number in SCORED_ROWS:
            first, second = row.measure(invented_run), row.measure(invented_run)
            assert (first.figures, first.said, first.pictures) == (second.figures, second.said, second.pictures)


def test_the_rows_call_what_they_compare_as_the_report_in_the_documentation_does(invented_run: Bench) -> None:
    for job in TINY.paper():  # which the report has
        write_invented(invented_run.store, job)
    for row in rows():
        if row.claim.number in SCORED_ROWS and row.claim.number not in (5, 6):  # which name their sizes
            assert words_of(row.measure(invented_run)) == words_of(row.claim.number)


@pytest.mark.parametrize("gpu", [False, True])
def test_a_run_trains_the_papers_plain_network_if_there_is_a_gpu(
    gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Job] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(run, "load_images", lambda *_: IMAGES)

    def note(jobs: list[Job], _: Workshop) -> list[Job]:
        seen.extend(jobs)
        return []

    monkeypatch.setattr(run, "train", note)
    assert run.run(Settings(TINY, tmp_path, (1,)), train_only=True, no_training=False) == 0
    assert [job for job in seen if job.kind != PAPER] == TINY.base(KINDS)
    assert [job for job in seen if job.kind == PAPER] == (TINY.paper() if gpu else [])
    assert [job.size for job in SCALES["full"].paper()] == [PAPER_SIZE] * 3


def test_the_networks_of_a_run_with_a_gpu_are_those_of_the_report_in_the_documentation() -> None:
    with (DOCS / RUNS_FILE).open() as file:
        trained = [line["run"] for line in csv.DictReader(file)]
    assert trained == [job.name for job in jobs_of(rows(), SCALES["full"], gpu=True)]


def measured(bench: Bench, *numbers: int) -> tuple[int, str, str]:
    """Measure rows of a run; return the exit status, and the report as Markdown and as HTML."""
    status = run.run(Settings(TINY, bench.store.folder, numbers), train_only=False, no_training=True)
    text, page = ((bench.store.folder / "report" / name).read_text() for name in (MARKDOWN_FILE, HTML_FILE))
    return status, text, page


@pytest.fixture
def images_of_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "load_images", lambda *_: IMAGES)


@pytest.mark.usefixtures("images_of_tests", "process_state")
def test_row_1_quotes_the_papers_network_without_a_gpu_and_is_measured_again_once_it_is_trained(
    invented_run: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, *pages = measured(invented_run, 1)
    assert status == 0
    for text in pages:
        assert "0.39 % errors (Sabour et al. 2017): quoted, not trained: no GPU" in text
        assert "capsules against the paper" not in text
    for job in TINY.paper():
        write_invented(invented_run.store, job)
    status, *pages = measured(invented_run, 1)
    assert status == 0
    for text in pages:
        assert "trained with 1,234 parameters; published: 0.39 % errors (Sabour et al. 2017)" in text
        assert "not trained" not in text
        assert re.search("capsules against the paper(&#x27;|')s plain network", text)
        assert "plain, as in the paper: " in text
    with (invented_run.store.folder / "report" / RUNS_FILE).open() as file:
        assert {job.name for job in TINY.paper()} <= {line["run"] for line in csv.DictReader(file)}


@pytest.mark.usefixtures("images_of_tests", "process_state")
def test_a_row_that_fails_says_so_in_the_report_and_the_others_go_on(
    invented_run: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    job = next(job for job in TINY.special(PLACED, ["K3"]) if job.seed == 1)
    file = invented_run.store.folder / "runs" / job.name / "crowding.npz"
    kept = file.read_bytes()
    with np.load(file) as arrays:
        np.savez(file, **{**arrays, "explained": np.full_like(arrays["explained"], np.nan)})
    status, text, page = measured(invented_run, 14, 15)
    assert status == 1
    reason = "failed: ValueError: explained: an outcome is not finite"
    assert "## 14. Crowding: FAILED" in text and f"- this run: {reason}" in text and reason in page
    assert "## 15. Busy backgrounds: NOT CONFIRMED" in text
    assert f"row 14, Crowding, {reason}" in capsys.readouterr().err
    _, text, _ = measured(invented_run, 15)
    assert "## 14. Crowding: FAILED" in text
    file.write_bytes(kept)
    status, text, _ = measured(invented_run, 14, 15)
    assert status == 0 and "FAILED" not in text


@pytest.mark.usefixtures("images_of_tests", "process_state")
def test_a_row_with_a_damaged_file_fails_and_one_without_its_networks_is_not_run(invented_run: Bench) -> None:
    measured(invented_run, 14, 15)
    file = invented_run.store.folder / "rows" / "14" / "evidence.json"
    file.write_text("[]")
    status, text, _ = measured(invented_run, 2, 14, 15)
    assert status == 1
    assert f"- this run: failed: {file} is damaged; remove it" in text
    assert "## 15. Busy backgrounds: NOT CONFIRMED" in text
    file.unlink()
    job = TINY.special(PLACED, ["K3"])[0]
    (invented_run.store.folder / "runs" / job.name / "figures.json").unlink()
    _, text, _ = measured(invented_run, 14)
    assert f"- this run: not run: 1 of its networks are not trained, such as {job.name}" in text


def result_of(number: int, gain: float) -> Result:
    [row] = [one for one in rows() if one.claim.number == number]
    source = np.random.default_rng(0)
    worse = source.random((2, 300))
    comparison = Comparison("capsules against plain", "K3", "C0", worse + gain, worse)
    return Result(row.claim, Evidence((comparison,), {"a": [1, 2.5]}, {"A": b"png"}, "Said."), {
        "seconds": 60.0, "device": "a device", "commit": "abc",
    })  # fmt: skip


@pytest.mark.parametrize("number", [row.claim.number for row in rows()])
def test_swapping_the_outcomes_in_a_runs_folder_flips_the_verdict_of_its_report(number: int, tmp_path: Path) -> None:
    write_result(result_of(number, 100.0), tmp_path)
    store, all_rows = Store(tmp_path), rows()

    def verdict() -> str:
        [entry] = [one for one in collect(all_rows, TINY, store, "").entries if one.claim.number == number]
        return entry.verdict

    assert verdict() == Verdict.CONFIRMED.value
    file = tmp_path / "rows" / f"{number:02}" / "outcomes.npz"
    with np.load(file) as stored:
        swapped = {"0.a": stored["0.b"], "0.b": stored["0.a"]}
    np.savez(file, **swapped)
    assert verdict() == Verdict.NOT_CONFIRMED.value


def test_a_stored_result_is_read_as_it_was(tmp_path: Path) -> None:
    result = result_of(1, 0.5)
    write_result(result, tmp_path)
    found = read_result(result.claim, tmp_path)
    assert found and found.origin == result.origin and found.evidence.figures == result.evidence.figures
    assert found.evidence.pictures == result.evidence.pictures and found.evidence.said == "Said."
    assert np.array_equal(found.evidence.comparisons[0].a, result.evidence.comparisons[0].a)


def test_the_report_says_which_rows_were_not_run_and_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    write_result(result_of(1, 0.5), tmp_path)
    report = collect(rows(), TINY, Store(tmp_path), "python -m training.claims quick")
    write_report(report, [], tmp_path / "report")
    page = (tmp_path / "report" / HTML_FILE).read_text()
    text = (tmp_path / "report" / MARKDOWN_FILE).read_text()
    assert [entry.verdict for entry in report.entries].count(NOT_RUN) == len(rows()) - 1
    assert "its figures mean nothing" in page and "its figures mean nothing" in text
    assert page.count("This row was not run.") == 2 * (len(rows()) - 1)  # on its card and in its section
    assert text.count(f"**{NOT_RUN}** | This row was not run. |") == len(rows()) - 1
    for row in rows():
        assert f'id="row-{row.claim.number}"' in page and f'<a id="row-{row.claim.number}"></a>' in text
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", page) and "http" not in page
    assert (tmp_path / "report" / "pictures" / "01-0.png").read_bytes() == b"png"
    with (tmp_path / "report" / COMPARISONS_FILE).open() as file:
        lines = list(csv.DictReader(file))
    assert [line["verdict"] for line in lines] == ["CONFIRMED"] * 2


def committed_verdicts() -> dict[int, str]:
    """Return the verdicts of the report in docs/claims, by row."""
    with (DOCS / COMPARISONS_FILE).open() as file:
        return {int(line["row"]): line["verdict"] for line in csv.DictReader(file) if line["verdict"]}


@pytest.mark.parametrize("number", [row.claim.number for row in rows()])
def test_the_verdicts_of_the_report_in_the_documentation_follow_from_its_outcomes(number: int) -> None:
    [claim] = [row.claim for row in rows() if row.claim.number == number]
    with np.load(DOCS / OUTCOMES / f"{number:02}.npz") as stored:
        a, b = stored["a"], stored["b"]
    verdict = judge(bootstrap(Comparison("", "", "", a, b), 100), claim.enough)
    assert verdict.value == committed_verdicts()[number]
    if verdict is not Verdict.NOT_CONFIRMED:
        assert judge(bootstrap(Comparison("", "", "", b, a), 100), claim.enough) is Verdict.NOT_CONFIRMED


def test_the_readme_says_of_each_claim_what_the_report_says() -> None:
    text = (ROOT / "README.md").read_text()
    item = re.compile(r"^- (CONFIRMED|WEAKER|NOT CONFIRMED)\b(.*(?:\n  .*)*)", re.MULTILINE)
    found = [
        (number, anchor, verdict)
        for verdict, words in item.findall(text)
        for number, anchor in re.findall(r"\[(\d+)\]\(docs/claims/README\.md#row-(\d+)\)", words)
    ]
    assert {int(number): verdict for number, _, verdict in found} == committed_verdicts()
    assert len(found) == len(committed_verdicts())
    assert all(number == anchor for number, anchor, _ in found)
    told = re.search(r"Row 3 is\s+confirmed .* with our decoder it would be ([A-Z ]+)\.", text, re.DOTALL)
    assert told and told.group(1) == compared(3, "with our decoder").value


def compared(number: int, words: str) -> Verdict:
    """Return the verdict that the first comparison with these words would have given in the report in docs/claims."""
    [claim] = [row.claim for row in rows() if row.claim.number == number]
    with (DOCS / COMPARISONS_FILE).open() as file:
        line = next(one for one in csv.DictReader(file) if one["row"] == str(number) and words in one["comparison"])
    return judge(Interval(*(float(line[name]) for name in ("difference", "low", "high"))), claim.enough)


def test_the_report_in_the_documentation_is_what_its_figures_and_the_words_of_today_give(tmp_path: Path) -> None:
    copy = shutil.copytree(DOCS, tmp_path / "claims")
    assert rewrite.main([str(copy)]) == 0
    for name in (MARKDOWN_FILE, HTML_FILE, COMPARISONS_FILE, JSON_FILE):
        assert (copy / name).read_text() == (DOCS / name).read_text(), f"python -m training.claims.rewrite {DOCS}"


def test_a_report_is_written_again_from_its_own_files_with_new_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_result(result_of(1, 0.5), tmp_path)
    write_omission(Omission("it was too late", failed=True), result_of(2, 0).claim, tmp_path)
    jobs = [replace(job, keep=False) for job in TINY.base(["K3"])]
    for job in jobs:
        write_invented(Store(tmp_path), job)
    folder = tmp_path / "report"
    write_report(collect(rows(), TINY, Store(tmp_path), "a command"), jobs, folder)
    before = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    assert rewrite.main([str(folder)]) == 0
    assert {file: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    first, *others = rows()
    other = replace(first, claim=replace(first.claim, sentence="Other words."))
    monkeypatch.setattr("training.claims.rows.rows", lambda: [other, *others])
    assert rewrite.main([str(folder)]) == 0
    for name in (MARKDOWN_FILE, HTML_FILE):
        text = (folder / name).read_text()
        assert "Other words." in text and first.claim.sentence not in text and "failed: it was too late" in text


@pytest.mark.parametrize("content", [None, "[]", "{"])
def test_a_folder_without_a_report_is_not_written_again(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / RUNS_FILE).write_text("run\n")
        (tmp_path / JSON_FILE).write_text(content)
    assert rewrite.main([str(tmp_path)]) == 1
    name = RUNS_FILE if content is None else JSON_FILE
    assert str(tmp_path / name) in capsys.readouterr().err
    assert not (tmp_path / HTML_FILE).exists()


def test_every_link_to_a_row_of_the_report_leads_to_one() -> None:
    anchors = set(re.findall(r'<a id="(row-\d+)"></a>', (DOCS / MARKDOWN_FILE).read_text()))
    assert len(anchors) == len(rows())
    documents = ("README.md", "training/README.md", "models/README.md", "benchmarks/README.md")
    for name in (*documents, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))):
        assert set(re.findall(r"claims/README\.md#([\w-]+)", (ROOT / name).read_text())) <= anchors, name


def test_every_claim_has_its_words_and_a_number_of_its_own() -> None:
    claims = [row.claim for row in rows()]
    assert len({claim.number for claim in claims}) == len(claims)
    for claim in claims:
        assert claim.sentence.endswith(".") and claim.paper and claim.counter and claim.decides and claim.enough > 0


def test_a_row_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows \[17\]"):
        Settings(TINY, tmp_path, (1, 17))


def test_a_damaged_file_of_a_run_is_named(tmp_path: Path) -> None:
    store, job = Store(tmp_path), Job("K3", 1, 3, DIGITS, "tiny", batch=4, keep=True)
    store.write(job, build(spec_of(job)), {"test": {"answers": np.arange(9)}}, {"seconds": 1.0})
    store.kept("row", lambda: {"a": np.arange(9)})
    write_result(result_of(1, 0.5), tmp_path)
    claim = result_of(1, 0.5).claim
    for name, read in (
        ("weights.safetensors", lambda: store.net(job)),
        ("test.npz", lambda: store.arrays(job, "test")),
        ("figures.json", lambda: store.figures(job)),
        ("row.npz", lambda: store.kept("row", dict)),
        ("outcomes.npz", lambda: read_result(claim, tmp_path)),
        ("evidence.json", lambda: read_result(claim, tmp_path)),
    ):
        [file] = tmp_path.rglob(name)
        for content in (file.read_bytes()[:-40], b""):
            file.write_bytes(content)
            with pytest.raises(DamagedRunError, match=re.escape(f"{file} is damaged")):
                read()


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), DamagedRunError("a.npz is damaged")])
def test_a_full_disk_and_a_damaged_run_end_the_command_with_a_sentence(
    fault: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise fault

    monkeypatch.setattr(run, "run", fail)
    assert main(["quick"]) == 1
    assert capsys.readouterr().err.strip() == str(fault)


@pytest.mark.usefixtures("images_of_tests", "process_state")
def test_a_folder_that_cannot_be_used_ends_the_command_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(folder: Path, scale: str = "quick") -> str:
        assert main([scale, "--no-training", "--out", str(folder)]) == 1
        return capsys.readouterr().err.strip()

    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file") == f"--out: {tmp_path / 'file'} is a file; expected a folder"
    below = tmp_path / "file" / "below"
    assert refusal(below) == f"--out: the folder {below} cannot be made: Not a directory"
    (tmp_path / "closed" / "lock").mkdir(parents=True)  # which root cannot write into, either
    assert refusal(tmp_path / "closed") == f"--out: nothing can be written into {tmp_path / 'closed'}: Is a directory"
    (tmp_path / "busy").mkdir()
    with alone_in(tmp_path / "busy"):
        assert refusal(tmp_path / "busy").startswith(f"{tmp_path / 'busy'} is in use by another run")
    assert "in use" not in refusal(tmp_path / "busy")  # the lock ends with its holder
    assert refusal(tmp_path / "busy", "full").startswith(f"{tmp_path / 'busy'} has a run of other sizes than those of")


@pytest.mark.parametrize("flag", ["--out", "--data-dir", "--clothes-dir"])
def test_a_folder_without_a_name_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quick", flag, ""])
    assert f"argument {flag}: nothing; expected a folder" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["-1", "nan", "soon"])
def test_the_seconds_must_be_a_number_of_0_or_more(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quick", f"--seconds={seconds}"])
    assert f"{seconds}; expected a number of 0 or more" in capsys.readouterr().err


def test_no_seconds_leave_no_time_for_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines: list[float | None] = []

    def note(settings: Settings, **_: object) -> int:
        deadlines.append(settings.deadline)
        return 0

    monkeypatch.setattr(run, "run", note)
    assert main(["quick", "--seconds", "0"]) == 0 and main(["quick"]) == 0
    assert deadlines[0] is not None and deadlines[1] is None


def test_a_run_either_trains_alone_or_measures_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quick", "--train-only", "--no-training"])
    assert "not allowed with" in capsys.readouterr().err
