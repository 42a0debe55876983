"""Tests of the benchmarks: they measure all variants, count memory exactly, and refuse unequal variants."""

import csv
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from onnx import ModelProto
from torch import nn

from benchmarks import export, routing
from benchmarks.routing import PASSES, VARIANTS, Variant, main, ours, peak_bytes
from export.to_onnx import to_onnx
from training.model import CONFIGS, CapsNet, CapsNetConfig, Routing

QUICK = ["--configs", "compact", "--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_variant_is_measured_in_both_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "routing.csv"
    assert main([*QUICK, "--batches", "1", "2", "--no-compile", "--out", str(out)]) == 0
    rows = read(out)
    names = [variant.name for variant in VARIANTS if not variant.compiled]
    assert [(row["batch"], row["pass"], row["variant"]) for row in rows] == list(product("12", PASSES, names))
    for row in rows:
        assert 0 < float(row["ms_quartile_1"]) <= float(row["ms"]) <= float(row["ms_quartile_3"])
        assert float(row["ratio_to_plain"]) > 0
        assert float(row["peak_mib"]) > 0
        assert (row["config"], row["rounds"], row["threads"], row["not_run"]) == ("compact", "1", "1", "")
        assert row["torch"] == torch.__version__
    assert {row["ratio_to_plain"] for row in rows if row["variant"] == "plain"} == {"1"}
    assert "compact, batch 2" in capsys.readouterr().out


def test_a_variant_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = Variant("other", partial(ours, choices=Routing(agreement="euclidean")))
    monkeypatch.setattr(routing, "VARIANTS", (VARIANTS[0], other))
    assert main([*QUICK, "--batches", "1", "--out", str(tmp_path / "routing.csv")]) == 1
    assert "compact, batch 1: other: poses differ from the plain loop's by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_variant_with_other_gradients_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Variant("other", partial(ours, choices=Routing(gradient=False)))
    monkeypatch.setattr(routing, "VARIANTS", (VARIANTS[0], other))
    assert main([*QUICK, "--batches", "1"]) == 1
    assert "compact, batch 1: other: gradient of u differ from the plain loop's by" in capsys.readouterr().err


def test_compiled_variants_are_left_out_with_the_reason_if_nothing_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(routing, "compiler_fault", lambda device: "no C++ compiler")
    out = tmp_path / "routing.csv"
    assert main([*QUICK, "--batches", "1", "--out", str(out)]) == 0
    rows = [row for row in read(out) if row["variant"].endswith("-compiled")]
    assert [(row["ms"], row["peak_mib"], row["not_run"]) for row in rows] == [("", "", "no C++ compiler")] * 4
    assert "not run: no C++ compiler" in capsys.readouterr().out


def test_peak_memory_is_counted_to_the_byte() -> None:
    before = torch.ones(1000)

    def step() -> None:
        first = before + before
        second = first + first
        del first
        third = second + second
        del second, third
        before.clone()

    assert peak_bytes(step, torch.device("cpu")) == 2 * 4000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "0"], "numbers of 1 or more"),
        (["--rounds", "0"], "numbers of 1 or more"),
        (["--threads", "0"], "numbers of 1 or more"),
    ],
)
def test_numbers_below_one_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def made() -> dict[str, bytes]:
    """The exported graphs by file name. Each is exported once, since an export takes seconds."""
    return {}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, made: dict[str, bytes]) -> None:
    export_plainly = export.export_plainly

    def to_onnx_once(network: CapsNet) -> ModelProto:
        if "fp32" not in made:
            made["fp32"] = to_onnx(network).SerializeToString()
        return ModelProto.FromString(made["fp32"])

    def export_plainly_once(module: nn.Module, outputs: list[str], config: CapsNetConfig, file: Path) -> None:
        if file.name not in made:
            export_plainly(module, outputs, config, file)
            made[file.name] = file.read_bytes()
        file.write_bytes(made[file.name])

    monkeypatch.setattr(export, "to_onnx", to_onnx_once)
    monkeypatch.setattr(export, "export_plainly", export_plainly_once)
    config = CapsNetConfig(image_size=20, classes=3, conv_channels=4, primary_types=2, decoder_widths=())
    monkeypatch.setitem(CONFIGS, "tiny", config)
    monkeypatch.setattr(export, "_SAMPLE_SECONDS", 0.0)


TINY = ["--configs=tiny", "--threads=1", "--rounds=1", "--no-compile"]


def test_the_exported_graphs_are_measured_beside_each_other(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "export.csv"
    assert export.main([*TINY, "--batches", "1", "3", f"--out={out}"]) == 0
    rows = read(out)
    names = {"onnx fp32", "onnx int8", "onnx einsum", "convolutions alone", "pytorch"}
    assert {row["variant"] for row in rows} - {"openvino"} == names
    assert {row["batch"] for row in rows} == {"1", "3"}
    for row in rows:
        assert float(row["images_per_second"]) > 0
        assert float(row["speed_of_onnx_fp32"]) > 0
        assert (row["variant"] != "onnx fp32") or row["speed_of_onnx_fp32"] == "1"
    assert "tiny, 1 thread" in capsys.readouterr().out


def test_a_graph_that_computes_something_else_is_not_measured(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = export.in_pytorch
    monkeypatch.setattr(export, "in_pytorch", lambda module: lambda images: honest(module)(images) + 1e-3)
    assert export.main([*TINY, "--batches=1"]) == 1
    assert "pytorch: poses differ by 0.001" in capsys.readouterr().err
