"""The command ``python -m export``: its flags, its refusals, and the export.

The import of PyTorch takes seconds, so all checks that do not need it come first.
"""

import argparse
import re
import sys
from pathlib import Path

from export.options import ExportOptions
from serving.files.options import add_flags, read
from serving.files.program import add_version, parse_flags, parse_path, reason_of
from training.data.folder import find_images
from training.data.sources import DatasetError
from training.run_folder import checkpoint_path


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m export",
        allow_abbrev=False,
        usage="%(prog)s [--data FOLDER] [--name NAME] [--model-version N] [--help] ... RUN OUT",
        description="Turn a checkpoint into a verified ONNX artifact for the server.",
    )
    result.add_argument(
        "checkpoint",
        metavar="RUN",
        type=parse_path,
        help="the run's folder, or its checkpoint (capsnet.pt or .safetensors)",
    )
    result.add_argument(
        "out", metavar="OUT", type=parse_path, help="the model repository; the artifact goes to OUT/NAME/VERSION"
    )
    add_version(result)
    add_flags(result, ExportOptions)
    return result


def run_command(arguments: list[str] | None = None) -> int:
    """Run the command with these arguments, by default the process's, and return its exit status."""
    command = parser()
    parsed = parse_flags(command, arguments)
    try:
        options = read(ExportOptions, parsed)
    except ValueError as error:
        command.error(str(error))
    path = checkpoint_path(parsed.checkpoint)
    try:
        if not path.exists():
            print(f"{path}: no such file", file=sys.stderr)
            return 1
        if options.data is not None:
            find_images(options.data)
        return _export(path, parsed.out, options)
    except DatasetError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; nothing of the export is left", file=sys.stderr)
        return 130


def _export(path: Path, out: Path, options: ExportOptions) -> int:
    """Export with PyTorch and print the figures. Return the command's exit status."""
    from export.build import export_checkpoint
    from export.graph import GraphError
    from export.to_tensorrt import EngineError, TensorRTMissing
    from export.triton import TritonError
    from export.verify import ParityError
    from serving.runtime import RuntimeSetupError
    from training import checkpoint
    from training.data.matching import load_matching

    try:
        trained = checkpoint.load(path)
        try:
            dataset = load_matching(trained, options.data, options.data_dir, source=options.source)
        except (checkpoint.CheckpointError, DatasetError) as error:
            raise type(error)(f"{path}: {error}") from error
        name = options.name or _default_name(trained.dataset)
        version = options.model_version or _next_version(out / name)
        artifact, failures = export_checkpoint(trained, dataset, out, name, version, options.chosen, tell=_tell)
    except (
        checkpoint.CheckpointError, DatasetError, EngineError, GraphError, ParityError, RuntimeSetupError,
        TensorRTMissing, TritonError, OSError,
    ) as error:  # fmt: skip
        print(reason_of(error), file=sys.stderr)
        return 1
    if options.model_version is None and version != "1":
        print(f"{name} has a version {int(version) - 1} already, so this is version {version}")
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


def _tell(step: str) -> None:
    print(step, flush=True)


def _default_name(dataset: str) -> str:
    plain = re.sub("[^a-z0-9]+", "-", dataset.removeprefix("folder:").lower()).strip("-")
    return f"capsnet-{plain or 'folder'}"


def _next_version(folder: Path) -> str:
    """Return one more than the highest version in a model's folder, finished or not."""
    versions = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    return str(max(versions, default=0) + 1)
