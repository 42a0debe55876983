"""Tests of checkpoint files: a written one comes back, and any other file is refused without being run."""

import io
import json
import pickle
import resource
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from training.checkpoint import FORMAT, Checkpoint, CheckpointError, load, save, save_tensors
from training.model import CapsNet, CapsNetConfig

CONFIG = CapsNetConfig(
    image_size=17, classes=3, conv_channels=2, primary_types=2, primary_dim=2, digit_dim=3, decoder_widths=(4, 5)
)
IMAGES = torch.linspace(0, 1, 2 * 17 * 17).reshape(2, 1, 17, 17)


class Touch:
    """An object that creates a file if an unsafe reader unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.path), "w")


def make_checkpoint(config: CapsNetConfig = CONFIG) -> Checkpoint:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CapsNet(config)
    return Checkpoint(
        config=config,
        dataset="tiny",
        labels=("a", "b", "c"),
        recipe={"epochs": 3, "learning_rate": 1e-3, "augment": "shift"},
        figures={"test_errors": 2, "test_images": 40, "test_mistakes": [3, 17], "torch": "2"},
        state_dict=model.state_dict(),
    )


def content(**changes: Any) -> dict[str, Any]:
    """Return the content that ``save`` writes, with changes."""
    checkpoint = make_checkpoint()
    fields = {name: getattr(checkpoint, name) for name in ("dataset", "labels", "recipe", "figures", "state_dict")}
    return fields | {"format": FORMAT, "config": asdict(CONFIG)} | changes


def assert_refused(path: Path, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_saved_checkpoint_can_be_loaded(tmp_path: Path) -> None:
    saved = make_checkpoint()
    path = tmp_path / "capsnet.pt"

    save(saved, path)
    loaded = load(path)

    assert [*tmp_path.iterdir()] == [path]
    assert replace(loaded, state_dict={}) == replace(saved, state_dict={})
    assert isinstance(loaded.config.decoder_widths, tuple)
    assert loaded.state_dict.keys() == saved.state_dict.keys()
    for name, value in saved.state_dict.items():
        assert loaded.state_dict[name].equal(value)


def test_a_loaded_model_answers_as_the_saved_one_and_is_in_evaluation_mode(tmp_path: Path) -> None:
    saved = make_checkpoint()
    save(saved, tmp_path / "capsnet.pt")

    model = load(tmp_path / "capsnet.pt").model()

    assert not any(module.training for module in model.modules())
    original = CapsNet(CONFIG)
    original.load_state_dict(saved.state_dict)
    with torch.no_grad():
        assert model(IMAGES).equal(original(IMAGES))


def test_a_network_without_a_decoder_is_saved_and_loaded_too(tmp_path: Path) -> None:
    save(make_checkpoint(replace(CONFIG, decoder_widths=())), tmp_path / "capsnet.pt")
    assert load(tmp_path / "capsnet.pt").model().decoder is None


def test_a_checkpoint_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "capsnet.pt"
    save(make_checkpoint(), path)
    save(replace(make_checkpoint(), dataset="other"), path)
    assert load(path).dataset == "other"


def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "capsnet.pt"
    save(make_checkpoint(), path)

    def write_half(written: object, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match="disk full"):
        save(replace(make_checkpoint(), dataset="other"), path)

    assert load(path).dataset == "tiny"


def test_a_full_disk_keeps_the_previous_checkpoint_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "capsnet.pt"
    save(make_checkpoint(), path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, before[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):  # PyTorch's writer has errors of its own
            save(replace(make_checkpoint(), dataset="other"), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert load(path).dataset == "tiny"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.pt", "no such file")


def test_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    assert_refused(tmp_path, "not a readable PyTorch file")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_file_that_was_cut_off_is_refused_by_name(tmp_path: Path, share: float) -> None:
    path = tmp_path / "capsnet.pt"
    save(make_checkpoint(), path)
    whole = path.read_bytes()

    path.write_bytes(whole[: int(share * len(whole))])

    assert_refused(path, ": not a")


@pytest.mark.parametrize(
    "raw",
    [
        b"hello\n",
        b'{"format": "capsnet-checkpoint-1"}',
        b"\x89PNG\r\n\x1a\n",
        b"\x08\x0a\x12\x0connx",
        b"PK\x03\x04" + bytes(40),
        bytes(100),
        b"1,2,3\n",
        b".",
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "capsnet.pt"
    path.write_bytes(raw)
    assert_refused(path, ": not a")


def test_code_in_a_pytorch_file_is_not_run(tmp_path: Path) -> None:
    path, touched = tmp_path / "capsnet.pt", tmp_path / "touched"
    torch.save(content(figures=Touch(touched)), path)

    assert_refused(path, "nothing in it was run")

    assert not touched.exists()


def test_code_in_a_bare_pickle_is_not_run(tmp_path: Path) -> None:
    path, touched = tmp_path / "capsnet.pt", tmp_path / "touched"
    path.write_bytes(pickle.dumps(Touch(touched), protocol=2))

    assert_refused(path, "nothing in it was run")

    assert not touched.exists()


def test_the_file_with_code_would_have_run_it_in_an_unsafe_reader(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    buffer = io.BytesIO()
    torch.save(content(figures=Touch(touched)), buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=False)["figures"].close()
    assert touched.exists()


def test_a_trainers_checkpoint_is_refused_with_a_hint_at_the_right_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    state = {f"model.{name}": value for name, value in make_checkpoint().state_dict.items()}
    torch.save({"epoch": 1, "global_step": 10, "pytorch-lightning_version": "2.6", "state_dict": state}, path)
    assert_refused(path, r"capsnet\.pt, not a trainer's last\.ckpt")


@pytest.mark.parametrize("other", [None, [1, 2], torch.zeros(3), make_checkpoint().state_dict])
def test_a_pytorch_file_with_something_else_in_it_is_refused_by_name(tmp_path: Path, other: object) -> None:
    path = tmp_path / "capsnet.pt"
    torch.save(other, path)
    assert_refused(path, f"not a {FORMAT} file")


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "capsnet-checkpoint-2"},
        {"config": None},
        {"config": {}, "extra": 1},
        {"config": asdict(CONFIG) | {"stride": 3}},
        {"config": asdict(CONFIG) | {"classes": 0}},
        {"config": asdict(CONFIG) | {"image_size": 16}},
        {"config": asdict(CONFIG) | {"image_size": "28"}},
    ],
    ids=["format", "no config", "unknown field", "unknown setting", "no classes", "small image", "text for a number"],
)
def test_a_checkpoint_with_unfit_fields_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "capsnet.pt"
    torch.save(content(**changes), path)
    assert_refused(path, "not a capsnet-checkpoint-1 file|fields do not fit")


@pytest.mark.parametrize("missing", ["format", "config", "labels", "state_dict"])
def test_a_checkpoint_that_lacks_a_field_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "capsnet.pt"
    torch.save({name: value for name, value in content().items() if name != missing}, path)
    assert_refused(path, "not a capsnet-checkpoint-1 file|fields do not fit")


WEIGHTS = make_checkpoint().state_dict
UNFIT_WEIGHTS = {
    "of another config": make_checkpoint(replace(CONFIG, classes=4)).state_dict,
    "with one missing": {name: value for name, value in WEIGHTS.items() if name != "weight"},
    "with one too many": WEIGHTS | {"bias": torch.zeros(3)},
    "that are no tensors": dict.fromkeys(WEIGHTS, 1.0),
}


@pytest.mark.parametrize("weights", UNFIT_WEIGHTS.values(), ids=UNFIT_WEIGHTS.keys())
def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path, weights: Any) -> None:
    path = tmp_path / "capsnet.pt"
    torch.save(content(state_dict=weights), path)
    with pytest.raises(CheckpointError, match="do not fit"):
        load(path).model()


@pytest.mark.parametrize("weights", [None, [1, 2], {1: torch.zeros(2)}], ids=["nothing", "a list", "a number's"])
def test_weights_that_are_no_state_are_refused(tmp_path: Path, weights: Any) -> None:
    path = tmp_path / "capsnet.pt"
    torch.save(content(state_dict=weights), path)
    with pytest.raises(CheckpointError, match="do not fit"):
        load(path).model()


def tensors(path: Path, weights: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """Write a safetensors file as ``save_tensors`` does, with changes of its fields."""
    fields = {name: value for name, value in content().items() if name not in ("format", "state_dict")}
    chosen = {name: value for name, value in WEIGHTS.items() if "decoder" not in name} if weights is None else weights
    save_file(chosen, path, {FORMAT: json.dumps(fields | changes)})
    return path


def test_a_checkpoint_of_tensors_comes_back_without_its_decoder(tmp_path: Path) -> None:
    saved = make_checkpoint()
    path = tmp_path / "checkpoint.safetensors"
    save_tensors(saved, path)
    loaded = load(path)
    assert [*tmp_path.iterdir()] == [path]
    assert replace(loaded, state_dict={}) == replace(saved, state_dict={})
    assert loaded.config.decoder_widths == CONFIG.decoder_widths, "as it was trained"
    assert loaded.model().decoder is None
    assert not [name for name in loaded.state_dict if name.startswith("decoder")]
    with torch.no_grad():
        assert loaded.model()(IMAGES).equal(saved.model()(IMAGES))
    first = path.read_bytes()
    save_tensors(saved, path)
    assert path.read_bytes() == first


def test_a_checkpoint_of_tensors_with_a_stem_and_half_precision_comes_back_in_single(tmp_path: Path) -> None:
    saved = make_checkpoint(replace(CONFIG, stem=((2, 3, 2, 1), (3, 3, 1, 1)), primary_kernel=3))
    halved = {name: value.half() if value.is_floating_point() else value for name, value in saved.state_dict.items()}
    save_tensors(replace(saved, state_dict=halved), tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors")
    assert loaded.config == saved.config
    assert {value.dtype for value in loaded.state_dict.values()} == {torch.float32, torch.int64}
    loaded.model()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9999])
def test_a_file_of_tensors_that_was_cut_off_is_refused_by_name(tmp_path: Path, share: float) -> None:
    path = tensors(tmp_path / "a.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert_refused(path, "not a readable safetensors file, or cut off")


@pytest.mark.parametrize(
    "raw",
    [
        b"hello\n",
        bytes(100),
        b"\xff" * 100,
        b"\x02\0\0\0\0\0\0\0{}",
        (2**62).to_bytes(8, "little") + b"{}",
        (90_000).to_bytes(8, "little") + b"[" * 90_000,
    ],
    ids=["text", "zeros", "ones", "empty", "long header", "deep header"],
)
def test_a_hostile_file_of_tensors_is_refused_by_name(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    assert_refused(path, "not a readable safetensors file, or cut off|not a capsnet-checkpoint-1 file")


def test_a_missing_or_foreign_file_of_tensors_is_refused_by_name(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.safetensors", "no such file")
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert_refused(tmp_path / "a.safetensors", "not a capsnet-checkpoint-1 file")
    (tmp_path / "folder.safetensors").mkdir()
    assert_refused(tmp_path / "folder.safetensors", "not a readable safetensors file")


@pytest.mark.parametrize(
    "changes",
    [
        {"config": None},
        {"config": {"stride": 3}},
        {"config": {"classes": 0}},
        {"config": {"classes": True}},
        {"config": {"image_size": "28"}},
        {"config": {"image_size": 28.0}},
        {"config": {"stem": [[1, 2]]}},
        {"config": {"stem": [[1, 2.5, 1, 0]]}},
        {"config": {"stem": 3}},
        {"config": {"decoder_widths": ["a"]}},
        {"config": {"agreement": ["scalar-product"]}},
        {"labels": "abc"},
        {"labels": [1, 2, 3]},
        {"dataset": None},
        {"recipe": []},
        {"figures": 1},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_checkpoint_of_tensors_with_unfit_fields_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert_refused(tensors(tmp_path / "a.safetensors", **changes), "fields do not fit")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"a"', "[" * 100_000])
def test_metadata_that_is_no_object_is_refused_by_name(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors", {FORMAT: text})
    assert_refused(tmp_path / "a.safetensors", "fields do not fit")


def test_a_config_of_a_huge_network_takes_no_memory(tmp_path: Path) -> None:
    huge = asdict(CONFIG) | {"primary_types": 10**6, "primary_dim": 10**4, "classes": 10**4}
    with pytest.raises(CheckpointError, match="do not fit"):
        load(tensors(tmp_path / "a.safetensors", config=huge)).model()
