"""``python -m export``: turn a checkpoint into a verified ONNX artifact for the service."""

import argparse
import re
import sys
from pathlib import Path

from export.build import BATCHES, export_checkpoint
from export.graph import GraphError
from export.to_onnx import OPSET, OPSETS
from export.to_tensorrt import EngineError, TensorRTMissing
from export.triton import TritonError
from export.verify import ParityError
from serving.runtime import RuntimeSetupError
from serving.tensorrt_options import BatchProfile
from training import checkpoint
from training.data.matching import load_matching
from training.data.sources import DatasetError


def _name(text: str) -> str:
    if not re.fullmatch("[a-z0-9][a-z0-9-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}; expected lower-case letters, digits and hyphens")
    return text


def _version(text: str) -> str:
    if not re.fullmatch("[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a positive integer")
    return text


def _next_version(folder: Path) -> str:
    """One more than the highest version in a model's folder, finished or not."""
    versions = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    return str(max(versions, default=0) + 1)


def _default_name(dataset: str) -> str:
    plain = re.sub("[^a-z0-9]+", "-", dataset.removeprefix("folder:").lower()).strip("-")
    return f"capsnet-{plain or 'folder'}"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m export", description="Turn a checkpoint into a verified ONNX artifact for the server."
    )
    result.add_argument("checkpoint", type=Path, help="the checkpoint that training wrote, capsnet.pt")
    result.add_argument("out", type=Path, help="the model repository; the artifact goes to OUT/NAME/VERSION")
    result.add_argument("--name", type=_name, help="the model's name (default: capsnet-DATASET)")
    result.add_argument("--version", type=_version, help="the version (default: one more than the highest there)")
    result.add_argument("--data-dir", type=Path, help="a folder with the dataset's files, or to store them in")
    result.add_argument("--data", type=Path, metavar="FOLDER", help="the folder of images that it was trained on")
    result.add_argument(
        "--tensorrt", action="store_true", help="also build a TensorRT engine, for the GPU of this machine"
    )
    result.add_argument(
        "--batches",
        type=int,
        nargs=2,
        default=(BATCHES.opt, BATCHES.max),
        metavar=("OPT", "MAX"),
        help="what TensorRT and Triton are to expect: batches of up to MAX images, fastest at OPT (default: 8 32)",
    )
    result.add_argument(
        "--opset", type=int, choices=OPSETS, default=OPSET, help=f"version of the ONNX operators (default: {OPSET})"
    )
    return result


def main(arguments: list[str] | None = None) -> int:
    command = parser()
    options = command.parse_args(arguments)
    try:
        batches = BatchProfile(1, *options.batches)
    except ValueError as error:
        command.error(f"--batches: {error}")
    try:
        trained = checkpoint.load(options.checkpoint)
        try:
            dataset = load_matching(trained, options.data, options.data_dir)
        except (checkpoint.CheckpointError, DatasetError) as error:
            raise type(error)(f"{options.checkpoint}: {error}") from error
        name = options.name or _default_name(trained.dataset)
        version = options.version or _next_version(options.out / name)
        artifact, failures = export_checkpoint(
            trained, dataset, options.out, name, version, options.opset, batches, options.tensorrt
        )
    except (
        checkpoint.CheckpointError, DatasetError, EngineError, GraphError, ParityError, RuntimeSetupError,
        TensorRTMissing, TritonError, OSError,
    ) as error:  # fmt: skip
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {artifact.folder}: {', '.join(artifact.files)}")
    for precision, variant in artifact.variants.items():
        print(
            f"{precision}: test error {variant.test_error}, {variant.labels_changed} labels changed, "
            f"probabilities differ from PyTorch's by up to {variant.max_probability_difference:.2g}, "
            f"poses by up to {variant.max_pose_difference:.2g}"
        )
    for text in failures.values():
        print(f"not written: {text}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
