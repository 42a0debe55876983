"""``python -m benchmarks.gpu.onnx_cuda``: ONNX Runtime's CUDA provider against its CPU provider, and its speed.

PyTorch is imported before ONNX Runtime, since it brings the CUDA libraries that the provider needs.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from benchmarks.data import load_or_exit
from benchmarks.figures import write
from export.to_fp16 import to_fp16
from export.to_onnx import to_onnx
from training.checkpoint import load
from training.data.sources import add_file_flags
from training.model import CONFIGS, CapsNet
from training.provenance import commit, processor

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
PARITY_BATCH = 1000
_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def session(file: Path, cuda: bool, graph: bool = False) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not cuda:
        return ort.InferenceSession(str(file), options, providers=[_CPU])
    settings = {"use_tf32": "0", "enable_cuda_graph": "1" if graph else "0"}
    result = ort.InferenceSession(str(file), options, providers=[(_CUDA, settings), _CPU])
    if result.get_providers()[0] != _CUDA:
        raise RuntimeError(f"{file}: ONNX Runtime fell back to {result.get_providers()}")
    return result


def answers(runtime: Any, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return probabilities (N, J) and poses (N, J, E)."""
    parts = [
        runtime.run(["probabilities", "poses"], {"images": images[at : at + PARITY_BATCH]})
        for at in range(0, len(images), PARITY_BATCH)
    ]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def parity(name: str, file: Path, reference: Path, images: NDArray[np.uint8]) -> dict[str, Any]:
    """Compare a graph on CUDA with a reference graph on the CPU."""
    expected, poses = answers(session(reference, cuda=False), images)
    runtime = session(file, cuda=True)
    start = time.perf_counter()
    found, found_poses = answers(runtime, images)
    return {
        "graph": name,
        "images": len(images),
        "providers": " ".join(runtime.get_providers()),
        "max_pose_difference": f"{np.abs(found_poses - poses).max():.3g}",
        "labels_changed": int((found.argmax(1) != expected.argmax(1)).sum()),
        "not_finite": int((~np.isfinite(found_poses)).sum()),
        "seconds": round(time.perf_counter() - start, 3),
    }


def speed(
    name: str, file: Path, image_shape: Sequence[int], seconds: float, cuda: bool, max_batch: int
) -> list[dict[str, Any]]:
    """Return images a second by batch, with images on the device (bound, and as a CUDA graph) and on the host."""
    rows = []
    ways = ("host", "bound", "graph") if cuda else ("host",)
    for way in ways:
        try:
            runtime = session(file, cuda, graph=way == "graph")
            for batch in [size for size in BATCHES if size <= max_batch]:
                rate, median = _rate(runtime, way, batch, image_shape, seconds)
                row = {"graph": name, "way": way, "batch": batch, "images_per_second": f"{rate:.4g}"}
                rows.append(row | {"median_ms": f"{1000 * median:.4g}", "error": ""})
        except Exception as error:  # the other ways must still run
            rows.append({"graph": name, "way": way, "batch": "", "images_per_second": "", "median_ms": ""})
            rows[-1]["error"] = " ".join(str(error).split())[:200]
    return rows


def _rate(runtime: Any, way: str, batch: int, image_shape: Sequence[int], seconds: float) -> tuple[float, float]:
    images = np.random.default_rng(0).integers(0, 256, (batch, *image_shape), dtype=np.uint8)
    if way == "host":

        def call() -> None:
            runtime.run(["probabilities", "poses"], {"images": images})
    else:
        binding = runtime.io_binding()
        held = torch.from_numpy(images).cuda()
        binding.bind_input("images", "cuda", 0, np.uint8, tuple(held.shape), held.data_ptr())
        outputs = []
        for output in runtime.get_outputs():
            shape = (batch, *output.shape[1:])
            outputs.append(torch.empty(shape, device="cuda"))
            binding.bind_output(output.name, "cuda", 0, np.float32, shape, outputs[-1].data_ptr())
        options = ort.RunOptions()
        if way == "graph":
            options.add_run_config_entry("gpu_graph_id", str(batch))

        def call() -> None:
            runtime.run_with_iobinding(binding, options)
            torch.cuda.synchronize()

    for _ in range(3):
        call()
    took: list[float] = []
    begin = time.perf_counter()
    while len(took) < 5 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return batch * len(took) / sum(took), float(np.median(took))


def exported(name: str, checkpoint: Path | None, folder: Path) -> dict[str, Path]:
    """Export a checkpoint, or a network of this configuration with random weights, in both precisions."""
    torch.manual_seed(0)
    network = load(checkpoint).model() if checkpoint else CapsNet(CONFIGS[name]).eval()
    model = to_onnx(network)
    files = {"fp32": folder / f"{name}-fp32.onnx"}
    files["fp32"].write_bytes(model.SerializeToString())
    try:
        half = to_fp16(model)
    except Exception as error:  # a network without a half-precision export is measured in single precision
        print(f"{name}: no fp16: {error}", flush=True)
    else:
        files["fp16"] = folder / f"{name}-fp16.onnx"
        files["fp16"].write_bytes(half.SerializeToString())
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.onnx_cuda", allow_abbrev=False)
    add_file_flags(parser)
    parser.add_argument("--graph", action="append", default=[], metavar="NAME=FILE=REFERENCE", help="a served graph")
    parser.add_argument("--config", action="append", default=[], help="a configuration to export with random weights")
    parser.add_argument("--checkpoint", action="append", default=[], type=Path, help="a checkpoint to export")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each measurement")
    parser.add_argument("--max-batch", type=int, default=BATCHES[-1], help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available() and _CUDA in ort.get_available_providers()
    options.out.mkdir(parents=True, exist_ok=True)
    images = load_or_exit("mnist", options).test_images.numpy()
    graphs: list[tuple[str, Path, Path]] = []
    for given in options.graph:
        name, file, reference = given.split("=")
        graphs.append((name, Path(file), Path(reference)))
    for name, checkpoint in [(one, None) for one in options.config] + [(one.stem, one) for one in options.checkpoint]:
        files = exported(name, checkpoint, Path("/tmp"))
        graphs += [(f"{name}-{precision}", file, files["fp32"]) for precision, file in files.items()]
    origin = {
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "onnxruntime": ort.__version__,
        "torch": str(torch.__version__),
        "commit": commit(),
    }
    equal: list[dict[str, Any]] = []
    fast: list[dict[str, Any]] = []
    for name, file, reference in graphs:
        size = session(reference, cuda=False).get_inputs()[0].shape[1:]
        padded = np.pad(images, ((0, 0), (0, 0), *[((size[1] - 28) // 2,) * 2] * 2))
        try:
            if cuda:
                equal.append(parity(name, file, reference, np.ascontiguousarray(padded)) | origin)
                print(equal[-1], flush=True)
        except Exception as error:  # the next graph may still run
            print(f"{name}: {' '.join(str(error).split())[:300]}", flush=True)
            continue
        fast += [row | origin for row in speed(name, file, size, options.seconds, cuda, options.max_batch)]
        print(
            [
                (row["way"], row["batch"], row["images_per_second"], row["error"])
                for row in fast
                if row["graph"] == name
            ],
            flush=True,
        )
        if equal:
            write(options.out / "onnx-parity.csv", equal)
        write(options.out / "onnx-speed.csv", fast)
    return 0


if __name__ == "__main__":
    sys.exit(main())
