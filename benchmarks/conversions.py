"""``python -m benchmarks.conversions``: our int8 and fp16 graphs beside those of public converters, in one run."""

import argparse
import importlib
import importlib.util
import logging
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor
from tqdm import tqdm

from benchmarks.data import load_or_exit
from benchmarks.export import measure, session
from benchmarks.figures import origin, write
from export.build import calibration_images
from export.to_fp16 import rounded, to_fp16
from export.to_int8 import to_int8
from export.verify import edge_images
from serving.runtime import CPU, onnxruntime
from training.data.datasets import Dataset
from training.data.sources import add_file_flags
from training.data.specs import DATASETS

FIRST = "onnx fp32"
OURS_INT8, OURS_FP16 = "int8, ours", "fp16, ours"
FP32_FILE = "fp32.onnx"
CONVERTER = "onnxconverter_common"
_CALIBRATION_BATCH = 64
_TEST_BATCH = 250

Convert = Callable[[ModelProto, Tensor, Path], ModelProto]


class _Reader:
    """Calibration images in batches, as ``quantize_static`` reads them."""

    def __init__(self, images: Tensor) -> None:
        self._batches = iter([batch.numpy() for batch in torch.split(images, _CALIBRATION_BATCH)])

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


def statically(
    method: str = "MinMax", operators: list[str] | None = None, per_channel: bool = True, count: int | None = None
) -> Convert:
    """Convert by ``onnxruntime.quantization.quantize_static``, prepared as its manual says.

    method: of calibration. operators: the operators to quantise; None for all possible ones. count: the number of
    calibration images; None for all. With percentiles, the histograms of all 1,024 images take minutes.
    """

    def convert(model: ModelProto, images: Tensor, folder: Path) -> ModelProto:
        onnxruntime()
        quantization = importlib.import_module("onnxruntime.quantization")
        prepared, file = folder / "prepared.onnx", folder / "static.onnx"
        quantization.quant_pre_process(str(folder / FP32_FILE), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared), str(file), _Reader(images[:count]), quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=operators, per_channel=per_channel,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod[method],
        )  # fmt: skip
        return onnx.load_model(file)

    return convert


def by_converter(*blocked: str) -> Convert:
    """Convert by onnxconverter-common's ``convert_float_to_float16``. blocked: operators that stay in float32."""

    def convert(model: ModelProto, images: Tensor, folder: Path) -> ModelProto:
        float16 = importlib.import_module(f"{CONVERTER}.float16")
        block = [*float16.DEFAULT_OP_BLOCK_LIST, *blocked]
        with warnings.catch_warnings(action="ignore"):
            result: ModelProto = float16.convert_float_to_float16(model, keep_io_types=True, op_block_list=block)
        return result

    return convert


CONVERSIONS: Mapping[str, Convert] = {
    OURS_INT8: lambda model, images, folder: to_int8(model, images),
    "int8, quantize_static": statically(),
    "int8, quantize_static, one scale a tensor": statically(per_channel=False),
    "int8, quantize_static, convolutions": statically(operators=["Conv"]),
    "int8, quantize_static, convolutions, percentile": statically("Percentile", ["Conv"], count=128),
    OURS_FP16: lambda model, images, folder: to_fp16(model),
    "fp16, onnxconverter-common": by_converter(),
    "fp16, onnxconverter-common, cast in fp32": by_converter("Cast"),
}


def answers(file: Path, images: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return probabilities (M, J) and poses (M, J, E) for uint8 images (M, C, H, W)."""
    runtime = onnxruntime().InferenceSession(str(file), providers=[CPU])
    parts = [
        runtime.run(["probabilities", "poses"], {"images": images.numpy()[at : at + _TEST_BATCH]})
        for at in range(0, len(images), _TEST_BATCH)
    ]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def compared(file: Path, expected: tuple[NDArray[np.float32], ...], dataset: Dataset) -> dict[str, Any]:
    """Return a graph's figures on test images of one object. expected: the answers in single precision."""
    probabilities, poses = answers(file, dataset.test_images)
    found, before = probabilities.argmax(1), expected[0].argmax(1)
    return {
        "errors": int((found != dataset.test_labels.numpy()).sum()),
        "labels_changed": int((found != before).sum()),
        "max_pose_difference": f"{np.abs(poses - expected[1]).max():.3g}",
        "mean_pose_difference": f"{np.abs(poses - expected[1]).mean():.3g}",
        "not_finite": int((~np.isfinite(poses)).sum()),
        "edge_images_not_finite": int((~np.isfinite(answers(file, edge_images(*dataset.image_shape[:2]))[1])).sum()),
    }


def converted(model: ModelProto, images: Tensor, folder: Path) -> dict[str, Path]:
    """Write the graph itself and the result of each converter. Standard error names each converter that fails."""
    files = {FIRST: folder / FP32_FILE}
    onnx.save_model(model, files[FIRST])
    for number, (name, convert) in enumerate(CONVERSIONS.items()):
        if CONVERTER.replace("_", "-") in name and importlib.util.find_spec(CONVERTER) is None:
            print(f"{name}: not run, onnxconverter-common is not installed", file=sys.stderr)
            continue
        file = folder / f"{number}.onnx"
        try:
            onnx.save_model(convert(onnx.load_model(files[FIRST]), images, folder), file)
            session(file, 1)
        except Exception as error:  # a converter that fails on one graph must not end the others
            print(f"{name}: not run, {' '.join(str(error).split())[:300]}", file=sys.stderr)
            continue
        files[name] = file
    return files


def row_of(file: Path, rounded_file: Path | None, expected: tuple[NDArray[np.float32], ...], dataset: Dataset) -> Any:
    """Return the figures of one graph; in half precision also those with each operation rounded."""
    row = compared(file, expected, dataset) | {"bytes": file.stat().st_size}
    told = compared(rounded_file, expected, dataset) if rounded_file else {}
    return row | {f"{name}_rounded": told.get(name, "") for name in ("errors", "labels_changed", "max_pose_difference")}


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.conversions", description=__doc__)
    command.add_argument("graphs", nargs="+", type=Path, metavar="FILE", help="a model.onnx that the export wrote")
    command.add_argument("--dataset", choices=DATASETS, default="mnist", help="what the networks were trained on")
    add_file_flags(command)
    command.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], metavar="N")
    command.add_argument("--rounds", type=int, default=7, metavar="N", help="samples of each speed (default: 7)")
    command.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each (default: 1)")
    command.add_argument("--images", type=int, metavar="N", help="test on the first N images alone")
    command.add_argument("--out", type=Path, help="write the figures to this CSV file too")
    options = command.parse_args(arguments)
    logging.getLogger().setLevel(logging.ERROR)  # the converters log every node that they change
    dataset = load_or_exit(options.dataset, options)
    if options.images:
        images, labels = dataset.test_images[: options.images], dataset.test_labels[: options.images]
        dataset = replace(dataset, test_images=images, test_labels=labels)
    calibration = calibration_images(dataset)
    rows: list[dict[str, Any]] = []
    for graph in options.graphs:
        model = onnx.load_model(graph)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            files = converted(model, calibration, folder)
            expected = answers(files[FIRST], dataset.test_images)
            calls = {variant: session(file, options.threads) for variant, file in files.items()}
            speeds = {
                batch: measure(calls, dataset.test_images[:batch].numpy(), options.rounds)
                for batch in tqdm(options.batches, str(graph), unit="batch", leave=False)
            }
            print(f"\n{graph}")
            for variant, file in files.items():
                emulation = None
                if variant.startswith("fp16"):
                    emulation = folder / "rounded.onnx"
                    onnx.save_model(rounded(onnx.load_model(file)), emulation)
                row = row_of(file, emulation, expected, dataset)
                for batch, samples in speeds.items():
                    ratios = [one / other for one, other in zip(samples[FIRST], samples[variant], strict=True)]
                    row[f"images_per_second_{batch}"] = f"{batch / statistics.median(samples[variant]):.4g}"
                    row[f"speed_of_fp32_{batch}"] = f"{statistics.median(ratios):.3g}"
                print(f"{variant:<56}" + "".join(f"{value!s:>10}" for value in row.values()))
                rows.append({"graph": graph, "variant": variant} | row)
    if options.out:
        where = origin()
        write(options.out, [row | {"threads": options.threads, "rounds": options.rounds} | where for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
