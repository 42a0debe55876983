"""Tests of learning rates, weight decay, averages and the default arithmetic."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from training.optimization import cosine_factor, ema_decay, exponential_factor, parameter_groups
from training.precision import avoid_matrix_tiles, default_precision, subnormals_flushed


def test_the_decay_of_averages_grows_with_the_step_up_to_its_limit() -> None:
    steps = torch.tensor([1, 10, 8990, 100_000])
    expected = [2 / 11, 11 / 20, 0.999, 0.999]
    assert ema_decay(steps, 0.999).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_cosine_rises_in_a_line_and_falls_to_zero() -> None:
    factors = [cosine_factor(step, 4, 24) for step in range(26)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[14] == pytest.approx(0.5)
    assert factors[24:] == pytest.approx([0, 0])


def test_the_exponential_schedule_is_the_authors() -> None:
    assert exponential_factor(0, 1, 1e-3) == 1
    assert exponential_factor(2000, 1, 1e-3) == pytest.approx(0.96)
    assert exponential_factor(5000, 1, 1e-3) == pytest.approx(0.96**2.5)
    assert 1e-3 * exponential_factor(10_000_000, 1, 1e-3) == pytest.approx(1e-6)
    assert exponential_factor(0, 10, 1e-3) == 0.1


def test_matrices_and_kernels_alone_decay() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(4, 5))
    decaying, others = parameter_groups(model, 0.01)
    assert [tuple(p.shape) for p in decaying["params"]] == [(2, 1, 3, 3), (5, 4)]
    assert [tuple(p.shape) for p in others["params"]] == [(2,), (2,), (2,), (5,)]
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.01, 0.0)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse2 avx512f avx512_bf16 avx512_vnni", "bf16-mixed"),
        ("fpu amx_tile amx_bf16", "bf16-mixed"),
        ("fpu sse2 avx2 avx512f avx512_vnni", "32-true"),
        ("", "32-true"),
    ],
)
def test_bfloat16_is_the_default_where_the_processor_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: avx512_bf16\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    assert default_precision(cpuinfo) == expected


def test_without_cpuinfo_single_precision_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_precision(tmp_path / "nothing") == "32-true"


@pytest.mark.parametrize("supported", [True, False])
def test_on_a_gpu_its_own_support_decides(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert default_precision() == ("bf16-mixed" if supported else "32-true")


@pytest.mark.parametrize(("given", "kept"), [(None, "AVX512_CORE_BF16"), ("AVX2", "AVX2")])
def test_onednn_uses_no_matrix_tiles_unless_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch, given: str | None, kept: str
) -> None:
    monkeypatch.setattr("os.environ", {} if given is None else {"ONEDNN_MAX_CPU_ISA": given})
    avoid_matrix_tiles()
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == kept


@pytest.mark.parametrize("already", [False, True])
def test_subnormal_numbers_are_flushed_for_a_time_only(already: bool) -> None:
    small = sys.float_info.min
    with subnormals_flushed() if already else nullcontext():
        before = small / 2
        with pytest.raises(KeyError), subnormals_flushed():
            assert small / 2 == 0
            assert torch.tensor([small]).div(2) == 0
            raise KeyError
        assert small / 2 == before
        assert (before == 0) == already
