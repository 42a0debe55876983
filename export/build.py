"""A checkpoint as an artifact: every graph, each certified as it will be served, and the manifest that names them."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import onnx
import torch
from torch import Tensor

from export import triton
from export.certificate import CERTIFICATE, certificate
from export.graph import GraphError, receptive_field
from export.to_fp16 import to_fp16
from export.to_int8 import to_int8
from export.to_onnx import OPSET, decoder_to_onnx, explanation_to_onnx, to_onnx
from export.to_tensorrt import build_engine
from export.verify import ParityError, Reference, certify, certify_decoder, certify_explanation, reference, speeds
from serving.artifact import MODEL, PRECISIONS, Artifact, Graph, Training, Variant, digest, write_manifest
from serving.runtime import Runtime, RuntimeSetupError, usable_cores
from serving.tensorrt_options import BatchProfile
from training.checkpoint import Checkpoint, CheckpointError
from training.data.compose import scenes
from training.data.datasets import Dataset
from training.model import CapsNet
from training.provenance import commit, processor

CALIBRATION_IMAGES = 1024
EXPLAIN, DECODER = "explain", "decoder"
ENGINE = "model.plan"
BATCHES = BatchProfile(1, 8, 32)


class Export(NamedTuple):
    """A written artifact, and of each graph that is not in it, since it differs too much from PyTorch, why."""

    artifact: Artifact
    failures: dict[str, str]


def export_checkpoint(
    checkpoint: Checkpoint,
    dataset: Dataset,
    out: Path,
    name: str,
    version: str,
    opset: int = OPSET,
    batches: BatchProfile = BATCHES,
    engine: bool = False,
) -> Export:
    """Export a checkpoint to ``out/name/version``, verify each graph as it will be served, write the manifest last.

    dataset: what the checkpoint was trained and tested on: its test images are what the graphs are compared on, and
    the checkpoint's figures are of; its training images are what int8 is calibrated on. opset: see ``to_onnx``.
    batches: what TensorRT and Triton are to expect; engine: build a TensorRT engine beside the graphs, which is not
    compared with anything.

    Where anything fails but int8 or fp16, nothing is left. ``config.pbtxt`` and ``labels.txt`` are written where this
    is the highest version.

    Raises FileExistsError where that folder is there already; CheckpointError where weights, labels or test images do
    not fit the config, or the figures are not those of the weights; GraphError, TritonError, TensorRTMissing,
    EngineError, RuntimeSetupError and ParityError as the functions called do; OSError where files cannot be written.
    """
    network = checkpoint.model()
    config = checkpoint.config
    if dataset.image_shape != config.image_shape:
        raise CheckpointError(
            f"the network takes images {config.image_shape}, the test set's are {dataset.image_shape}"
        )
    if len(checkpoint.labels) != config.classes:
        raise CheckpointError(f"the checkpoint has {config.classes} classes but {len(checkpoint.labels)} labels")
    options = triton.Options(max_batch_size=batches.max, usual_batch_size=batches.opt)
    triton.check_labels(checkpoint.labels)
    training = _training(checkpoint, dataset)
    folder = out / name / version
    # Under a name that neither our server nor Triton takes for a version, until it is whole.
    work = out / name / f".{version}.partial"
    try:
        if folder.exists():
            raise FileExistsError
        work.mkdir(parents=True)
    except FileExistsError as error:
        reason = "exists already, and a version is never overwritten"
        if not folder.exists():
            reason = f"another export of it is under way, or was killed; in the latter case remove {work}"
        raise FileExistsError(f"{folder}: {reason}") from error
    artifact = Artifact(
        work,
        name,
        version,
        checkpoint.labels,
        config.image_shape,
        config.digit_dim,
        {},
        {},
        {},
        batches,
        training,
    )
    try:
        expected = reference(network, dataset.test_images, dataset.test_labels)
        model = to_onnx(network, opset)
        artifact, runtime = _with_variant(artifact, PRECISIONS[0], model, expected)
        _check_figures(checkpoint, artifact.variants[PRECISIONS[0]])
        if engine:  # soon, since it is the most likely to fail
            build_engine(artifact.file(), work / ENGINE, batches)
            artifact = replace(
                artifact,
                files=artifact.files | {ENGINE: digest(work / ENGINE)},
                graphs={"tensorrt": Graph(ENGINE)},
            )
        runtimes = {PRECISIONS[0]: runtime}
        failures: dict[str, str] = {}
        others: dict[str, Callable[[], onnx.ModelProto]] = {
            "int8": lambda: to_int8(model, calibration_images(dataset)),
            "fp16": lambda: to_fp16(model),
        }
        for precision, make in others.items():
            try:
                artifact, runtimes[precision] = _with_variant(artifact, precision, make(), expected)
            except GraphError as error:
                failures[precision] = f"{precision}: {error}"
            except (ParityError, RuntimeSetupError) as error:
                (work / _file(precision)).unlink()
                failures[precision] = str(error)
        artifact = _with_extras(artifact, network, expected, opset)
        artifact = _with_speeds(artifact, runtimes, dataset.test_images)
        (work / CERTIFICATE).write_text(certificate(artifact, failures), encoding="utf-8")
        artifact = replace(artifact, files=artifact.files | {CERTIFICATE: digest(work / CERTIFICATE)})
        write_manifest(artifact)
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if not any(int(other.name) > int(version) for other in folder.parent.iterdir() if other.name.isdecimal()):
        triton.write(folder.parent, artifact.labels, artifact.image_shape, artifact.pose_size, options)
    return Export(replace(artifact, folder=folder), failures)


def calibration_images(dataset: Dataset, count: int = CALIBRATION_IMAGES) -> Tensor:
    """Training images as the network takes them, uint8 (count or fewer, C, S, S), the same at each call."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(dataset.train_images), generator=generator)[:count]
    images, labels = dataset.train_images[chosen], dataset.train_labels[chosen]
    return scenes(images, labels, dataset.objects, dataset.canvas, generator)[0] if dataset.canvas else images


def _file(precision: str) -> str:
    return MODEL if precision == PRECISIONS[0] else f"{precision}.onnx"


def _with_variant(
    artifact: Artifact, precision: str, model: onnx.ModelProto, expected: Reference
) -> tuple[Artifact, Runtime]:
    """The artifact with a further graph that classifies, written and certified, and the runtime that it ran in."""
    file = _file(precision)
    _write_graph(artifact, file, model, f"in {precision}")
    written = replace(
        artifact,
        files=artifact.files | {file: digest(artifact.folder / file)},
        variants={**artifact.variants, precision: Variant(file)},
    )
    runtime = Runtime(written.file(precision), "cpu", usable_cores(), quantized=precision == "int8")
    figures = certify(expected, runtime, precision)
    return replace(written, variants={**artifact.variants, precision: Variant(file, **figures)}), runtime


def _write_graph(artifact: Artifact, file: str, model: onnx.ModelProto, what: str) -> None:
    training = artifact.training
    model.doc_string = (
        f"Capsule network {artifact.name}, version {artifact.version}, trained on {training.dataset}, {what}."
    )
    properties = {
        "name": artifact.name,
        "version": artifact.version,
        "dataset": training.dataset,
        "test_data_sha256": training.test_data_sha256,
        "training_commit": str(training.figures.get("commit", "")),
        "export_commit": training.export_commit,
        "config": json.dumps(training.config),
    }
    onnx.helper.set_model_props(model, properties)
    # Of the graph's name, since TensorRT's engine cache tells models apart by it and not by their weights.
    model.graph.name = f"{artifact.name}-{artifact.version}-{Path(file).stem}"
    onnx.save_model(model, artifact.folder / file)


def _with_extras(artifact: Artifact, network: CapsNet, expected: Reference, opset: int) -> Artifact:
    """The artifact with the graphs that explain and reconstruct, certified."""
    files, graphs = dict(artifact.files), dict(artifact.graphs)
    file = f"{EXPLAIN}.onnx"
    _write_graph(artifact, file, explanation_to_onnx(network, opset), "with the couplings of its routing")
    explained = certify_explanation(network, artifact.folder / file, expected)
    graphs[EXPLAIN] = replace(explained, receptive_field=receptive_field(network.config))
    files[file] = digest(artifact.folder / file)
    if network.decoder is not None:
        file = f"{DECODER}.onnx"
        _write_graph(artifact, file, decoder_to_onnx(network, opset), "its decoder, from a pose to an image")
        graphs[DECODER] = certify_decoder(network, artifact.folder / file, expected)
        files[file] = digest(artifact.folder / file)
    return replace(artifact, files=files, graphs=graphs)


def _with_speeds(artifact: Artifact, runtimes: dict[str, Runtime], images: Tensor) -> Artifact:
    measured = speeds(runtimes, images)
    device = f"{processor()}, {usable_cores()} threads"
    return replace(
        artifact,
        variants={
            precision: replace(
                variant,
                bytes=(artifact.folder / variant.file).stat().st_size,
                images_per_second=measured[precision],
                device=device,
            )
            for precision, variant in artifact.variants.items()
        },
    )


def _check_figures(checkpoint: Checkpoint, variant: Variant) -> None:
    measured = {"test_errors": variant.test_errors, "test_images": variant.test_images}
    recorded = {name: checkpoint.figures.get(name) for name in measured}
    if measured != recorded:
        raise CheckpointError(
            f"the checkpoint's figures are not those of its weights: it says {recorded}, measured are {measured}"
        )


def _training(checkpoint: Checkpoint, dataset: Dataset) -> Training:
    """Return what the manifest says of the training run and the data, exactly as it will be read back."""
    data = hashlib.sha256(dataset.test_images.numpy().tobytes() + dataset.test_labels.numpy().tobytes())
    content = {
        "dataset": checkpoint.dataset,
        "test_data_sha256": data.hexdigest(),
        "config": asdict(checkpoint.config),
        "recipe": checkpoint.recipe,
        "figures": checkpoint.figures,
        "export_commit": commit(),
    }
    try:
        return Training(**json.loads(json.dumps(content, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's recipe or figures cannot be written as JSON: {error}") from error
