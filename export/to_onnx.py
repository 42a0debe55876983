"""A checkpoint's network as an ONNX file, and as a verified artifact around it."""

import json
import logging
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from export.graph import BATCH, INPUT, OUTPUTS, GraphError, ServedNetwork, check
from export.verify import verify
from serving.artifact import MODEL, Artifact, digest, write_manifest
from serving.runtime import Runtime
from training.checkpoint import Checkpoint, CheckpointError
from training.evaluate import wrong
from training.model import CapsNet

OPSETS = range(18, 26)  # those that PyTorch's exporter converts to by itself
OPSET = 20


def to_onnx(network: CapsNet, opset: int = OPSET) -> onnx.ModelProto:
    """The network as a checked ONNX graph, its batch axis left open; the same bytes for the same network.

    opset: the version of the ONNX operators, one of OPSETS. Raises GraphError.
    """
    config = network.config
    # The exporter takes an axis of length 1 for a fixed one.
    example = torch.zeros((2, config.image_channels, config.image_size, config.image_size), dtype=torch.uint8)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                ServedNetwork(network).eval(),
                (example,),
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_shapes={INPUT: {0: torch.export.Dim(BATCH)}},
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise GraphError(f"PyTorch cannot export the network: {error}") from error
    finally:
        logger.setLevel(level)
    assert program is not None
    model = program.model_proto
    _strip(model)
    check(model, config)
    return model


def export_checkpoint(
    checkpoint: Checkpoint, images: Tensor, labels: Tensor, out: Path, name: str, version: str, opset: int = OPSET
) -> Artifact:
    """Export a checkpoint to ``out/name/version``, verify it as it will be served, and write its manifest last.

    images: the test set that the checkpoint's figures were measured on, uint8 (B, C, H, W), 0 to 255; labels: the
    classes, int64 (B,), or (B, K) of images with K objects. opset: see ``to_onnx``.

    Where anything fails, the version's folder is removed again. Raises FileExistsError where that folder is there
    already; CheckpointError where weights, labels or test images do not fit the config, or the figures are not
    those of the weights; GraphError, RuntimeSetupError and ParityError as ``to_onnx``, ``Runtime`` and ``verify``
    do; OSError where the files cannot be written.
    """
    network = checkpoint.model()
    config = checkpoint.config
    shape = (config.image_channels, config.image_size, config.image_size)
    if tuple(images.shape[1:]) != shape:
        raise CheckpointError(f"the network takes images {shape}, the test set's are {tuple(images.shape[1:])}")
    if len(checkpoint.labels) != config.classes:
        raise CheckpointError(f"the checkpoint has {config.classes} classes but {len(checkpoint.labels)} labels")
    training = _training(checkpoint)
    folder = out / name / version
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise FileExistsError(f"{folder}: exists already, and a version is never overwritten") from error
    try:
        model = to_onnx(network, opset)
        model.doc_string = f"Capsule network {name}, version {version}, trained on {checkpoint.dataset}."
        properties = {"name": name, "version": version, "dataset": checkpoint.dataset}
        onnx.helper.set_model_props(model, properties | {"config": json.dumps(training["config"])})
        onnx.save_model(model, folder / MODEL)
        artifact = Artifact(
            folder=folder,
            name=name,
            version=version,
            labels=checkpoint.labels,
            image_shape=shape,
            pose_size=config.digit_dim,
            sha256=digest(folder / MODEL),
            training=training,
            parity={},
        )
        objects = labels.shape[1] if labels.ndim == 2 else 1
        parity, probabilities = verify(network, Runtime(artifact, device="cpu"), images, objects)
        measured = {"test_errors": int(wrong(probabilities, labels).sum()), "test_images": len(labels)}
        recorded = {figure: checkpoint.figures.get(figure) for figure in measured}
        if measured != recorded:
            raise CheckpointError(
                f"the checkpoint's figures are not those of its weights: it says {recorded}, measured are {measured}"
            )
        artifact = replace(artifact, parity=parity)
        write_manifest(artifact)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return artifact


def _training(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the manifest says of the training run, exactly as it will be read back."""
    content = {
        "dataset": checkpoint.dataset,
        "config": asdict(checkpoint.config),
        "recipe": checkpoint.recipe,
        "figures": checkpoint.figures,
    }
    try:
        result: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's recipe or figures cannot be written as JSON: {error}") from error
    return result


def _strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes, among them stack traces with the paths of the machine it ran on."""
    graph = model.graph
    graph.ClearField("metadata_props")
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
