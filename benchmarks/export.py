"""``python -m benchmarks.export``: images a second of the exported graphs, of PyTorch and of OpenVINO, in one run."""

import argparse
import csv
import importlib.util
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from tqdm import tqdm

from export.folding import folded
from export.to_int8 import to_int8
from export.to_onnx import to_onnx
from serving.runtime import CPU, onnxruntime
from training.model import CONFIGS, CapsNet, CapsNetConfig, lengths, squash, to_pixels
from training.provenance import processor, provenance

RESULTS = Path(__file__).parent / "results"
Images = NDArray[np.uint8]
Predict = Callable[[Images], NDArray[np.float32]]
#: The variant that the others are compared with.
REFERENCE = "onnx fp32"
CONVOLUTIONS = "convolutions alone"
# Greatest allowed difference of a component of a pose.
VARIANT_TOLERANCES = {"onnx int8": 0.2}
_DEFAULT_TOLERANCE = 1e-4
_SAMPLE_SECONDS = 0.05


class EinsumNetwork(nn.Module):
    """The same weights in a straightforward form: votes by einsum, and the same code in each iteration."""

    def __init__(self, network: CapsNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        config = self.network.config
        u = self.network.primary_capsules(to_pixels(images))
        u_hat = torch.einsum("bid,idje->bije", u, self.network.weight)
        b = torch.zeros_like(u_hat[..., 0])
        v = u_hat[:, 0]
        for iteration in range(config.routing_iterations):
            v = squash(torch.einsum("bij,bije->bje", b.softmax(dim=2), u_hat))
            if iteration < config.routing_iterations - 1:
                b = b + torch.einsum("bije,bje->bij", u_hat, v)
        return lengths(v), v


class Convolutions(nn.Module):
    """The layers before squash and routing, to show the share of time that these two take."""

    def __init__(self, network: CapsNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        pixels = to_pixels(images)
        features = self.network.stem(pixels) if self.network.config.stem else torch.relu(self.network.conv1(pixels))
        maps: Tensor = self.network.primary(features)
        return maps


class ServedInPyTorch(nn.Module):
    """The network from uint8 images to poses, like the exported graphs."""

    def __init__(self, network: CapsNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        poses: Tensor = self.network(to_pixels(images))
        return poses


def session(file: Path, threads: int) -> Predict:
    """Return an ONNX Runtime session on the CPU with the server's options, as a function."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    made = ort.InferenceSession(str(file), options, providers=[CPU])

    def predict(images: Images) -> NDArray[np.float32]:
        poses: NDArray[np.float32] = made.run(["poses"], {"images": images})[0]
        return poses

    return predict


def in_pytorch(module: Callable[[Tensor], Tensor]) -> Predict:
    def predict(images: Images) -> NDArray[np.float32]:
        with torch.inference_mode():
            poses: NDArray[np.float32] = module(torch.from_numpy(images)).numpy()
        return poses

    return predict


def in_openvino(file: Path, threads: int) -> Predict | None:
    """Compile the graph with OpenVINO. Return None if OpenVINO is not installed."""
    if importlib.util.find_spec("openvino") is None:
        return None
    openvino = importlib.import_module("openvino")
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(str(file), "CPU", settings)

    def predict(images: Images) -> NDArray[np.float32]:
        poses: NDArray[np.float32] = compiled([images])["poses"]
        return poses

    return predict


def export_plainly(module: nn.Module, outputs: list[str], config: CapsNetConfig, file: Path) -> None:
    """Export a module that takes images with PyTorch's exporter alone, and write it to an ONNX file."""
    example = torch.zeros((2, *config.image_shape), dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            module.eval(), (example,), input_names=["images"], output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, verbose=False,
        )  # fmt: skip
    assert program is not None
    program.save(str(file))


def variants(network: CapsNet, folder: Path, threads: int, compile_: bool) -> dict[str, Predict | str]:
    """Return the variants by name. For a variant that cannot run here, a text says why."""
    torch.set_num_threads(threads)
    model = to_onnx(network)
    config = network.config
    images = torch.randint(
        0, 256, (64, *config.image_shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    onnx.save_model(model, folder / "fp32.onnx")
    onnx.save_model(to_int8(model, images), folder / "int8.onnx")
    export_plainly(EinsumNetwork(network), ["probabilities", "poses"], config, folder / "einsum.onnx")
    export_plainly(Convolutions(folded(network)), ["poses"], config, folder / "convolutions.onnx")
    module = ServedInPyTorch(network).eval()
    result: dict[str, Predict | str] = {
        REFERENCE: session(folder / "fp32.onnx", threads),
        "onnx int8": session(folder / "int8.onnx", threads),
        "onnx einsum": session(folder / "einsum.onnx", threads),
        CONVOLUTIONS: session(folder / "convolutions.onnx", threads),
        "pytorch": in_pytorch(module),
        "openvino": in_openvino(folder / "fp32.onnx", threads) or "OpenVINO is not installed",
    }
    if compile_:
        torch.compiler.reset()
        compiled = in_pytorch(torch.compile(module))
        try:
            compiled(images[:2].numpy())
            result["pytorch compiled"] = compiled
        except BackendCompilerFailed:
            result["pytorch compiled"] = "there is no C++ compiler"
    return result


def measure(predict: dict[str, Predict], images: Images, rounds: int) -> dict[str, list[float]]:
    """Return the seconds a call of each variant takes, one sample in each round, all variants in turns."""
    samples: dict[str, list[float]] = {name: [] for name in predict}
    for call in predict.values():
        call(images)
    for _ in range(rounds):
        for name, call in predict.items():
            calls, begin = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - begin) < _SAMPLE_SECONDS or not calls:
                call(images)
                calls += 1
            samples[name].append(elapsed / calls)
    return samples


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    command.add_argument("--configs", nargs="+", choices=CONFIGS, default=["compact", "paper"], help="networks")
    command.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128], metavar="N")
    command.add_argument("--threads", nargs="+", type=int, default=[1, 2], metavar="N", help="threads of each")
    command.add_argument("--rounds", type=int, default=7, metavar="N", help="samples of each figure (default: 7)")
    command.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    command.add_argument("--out", type=Path, help="write the figures to this CSV file too")
    options = command.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    where = provenance(torch.device("cpu"))
    origin = {
        "device": processor(), "cores": os.cpu_count(), "torch": where["torch"],
        "onnxruntime": onnxruntime().__version__, "commit": where["commit"],
    }  # fmt: skip
    generator = np.random.default_rng(0)
    for config in options.configs:
        torch.manual_seed(0)
        network = CapsNet(CONFIGS[config]).eval()
        with torch.no_grad():
            network.weight.mul_(3)  # poses as long as a trained network's
        for threads in options.threads:
            with tempfile.TemporaryDirectory() as folder:
                known = variants(network, Path(folder), threads, not options.no_compile)
                usable = {name: one for name, one in known.items() if not isinstance(one, str)}
                for name, one in known.items():
                    if isinstance(one, str):
                        print(f"{name}: not run, {one}", file=sys.stderr)
                print(f"\n{config}, {threads} thread{'s' if threads > 1 else ''}: images a second, and x {REFERENCE}")
                print(f"{'batch':>7}" + "".join(f"{name:>22}" for name in usable))
                for batch in tqdm(options.batches, f"{config}, {threads}", unit="batch", leave=False):
                    shape = (batch, 1, network.config.image_size, network.config.image_size)
                    images = generator.integers(0, 256, shape, dtype=np.uint8)
                    expected = usable[REFERENCE](images)
                    for name, call in usable.items():
                        if name == CONVOLUTIONS:
                            continue
                        difference = float(np.abs(call(images) - expected).max())
                        if not difference <= VARIANT_TOLERANCES.get(name, _DEFAULT_TOLERANCE):
                            print(f"{name}: poses differ by {difference:.2g}", file=sys.stderr)
                            return 1
                    samples = measure(usable, images, options.rounds)
                    cells = []
                    for name, seconds in samples.items():
                        ratios = [one / other for one, other in zip(samples[REFERENCE], seconds, strict=True)]
                        speed, ratio = batch / statistics.median(seconds), statistics.median(ratios)
                        cells.append(f"{speed:>12,.0f} ({ratio:>5.2f} x)")
                        figures = {"images_per_second": f"{speed:.5g}", "speed_of_onnx_fp32": f"{ratio:.4g}"}
                        setting = {"config": config, "threads": threads, "batch": batch, "variant": name}
                        rows.append(setting | figures | {"rounds": options.rounds} | origin)
                    print(f"{batch:>7}" + "".join(f"{cell:>22}" for cell in cells))
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
