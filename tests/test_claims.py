"""Tests of the claims: networks of equal size, repeatable trainings, verdicts computed from outcomes, the report."""

import csv
import re
from dataclasses import replace
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tests.trainings import process_state
from training.claims import run
from training.claims.__main__ import main
from training.claims.bench import Bench
from training.claims.evidence import Comparison, Evidence, Interval, Verdict, bootstrap, judge
from training.claims.images import Images, Labelled, load_images
from training.claims.jobs import BACKGROUND, DIGITS, ONE_CLASS, PAIRS, PLACED, SCALES, SHAPES, Job
from training.claims.learn import Workshop, train
from training.claims.nets import KINDS, SIZES, NetSpec, build, parameters
from training.claims.report import COMPARISONS_FILE, HTML_FILE, MARKDOWN_FILE, OUTCOMES, write_report
from training.claims.results import Result, read_result, write_result
from training.claims.rows import rows
from training.claims.run import Settings, jobs_of
from training.claims.scoring import DISTANCES, Sets, scores
from training.claims.store import DamagedRunError, Store, round_weights, spec_of
from training.claims.streams import CHUNK_STEPS, ONE_CLASS_DIGIT, stream
from training.claims.summary import NOT_RUN, collect
from training.data.datasets import Dataset, load
from training.data.sources import DatasetError
from training.data.specs import NONE

__all__ = ["process_state"]

DOCS = ROOT / "docs" / "claims"
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
    raise DatasetError("no source has the files")


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


@pytest.mark.parametrize("flag", ["--data-dir", "--clothes-dir"])
def test_a_folder_without_the_files_is_an_error_also_in_a_quick_run(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if flag == "--clothes-dir":
        monkeypatch.setattr("training.claims.images.load", lambda name, folder, progress: digits_or_load(name, folder))
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
    found = scores(Bench(TINY, place.store, IMAGES).net(job), IMAGES.test.images)
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
    for job in jobs_of([row for row in rows() if row.claim.number in SCORED_ROWS], TINY):
        arrays = invented(job, 0.02 if job.kind == "K3" else 0.6)
        needed = {"test", "affine", "crowding", "pairs", "noise", "clothes"}
        net = build(spec_of(job))
        round_weights(net)
        store.write(job, net, {name: arrays[name] for name in needed}, {"parameters": 1, "seconds": 1.0})
    return Bench(TINY, store, IMAGES)


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
    write_report(report, [], Store(tmp_path), tmp_path / "report")
    page = (tmp_path / "report" / HTML_FILE).read_text()
    text = (tmp_path / "report" / MARKDOWN_FILE).read_text()
    assert [entry.verdict for entry in report.entries].count(NOT_RUN) == len(rows()) - 1
    assert page.count("This row was not run.") == len(rows()) - 1 and text.count(f"**{NOT_RUN}**") == len(rows()) - 1
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


@pytest.mark.parametrize("number", [row.claim.number for row in rows()])
def test_the_report_in_the_documentation_has_the_words_of_its_claims(number: int) -> None:
    [claim] = [row.claim for row in rows() if row.claim.number == number]
    text, page = ((DOCS / name).read_text() for name in (MARKDOWN_FILE, HTML_FILE))
    for words in (claim.sentence, claim.paper, claim.counter, claim.limits, claim.decides):
        assert words in text and escape(words) in page


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
