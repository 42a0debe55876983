"""Conversion of a checkpoint to an artifact: its graphs, each certified in the server's runtime, and its manifest."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import onnx
import torch
from torch import Tensor

from export import triton
from export.artifact_writer import ArtifactWriter
from export.calibrate import Calibrated, Network, calibrate
from export.certificate import CERTIFICATE, certificate
from export.graph import GraphError, receptive_field
from export.options import Choices
from export.shared_weights import share_weights
from export.to_fp16 import to_fp16
from export.to_int8 import to_int8
from export.to_int8_weights import to_int8_weights
from export.to_onnx import decoder_to_onnx, explanation_to_onnx, to_onnx
from export.to_tensorrt import build_engine
from export.verify import (
    ParityError,
    Prediction,
    Reference,
    certify,
    certify_decoder,
    certify_explanation,
    certify_rounded,
    reference,
    speeds,
)
from serving.artifact import MODEL, PRECISIONS, Artifact, Graph, Preparation, Training, Variant
from serving.runtime import Runtime, RuntimeSetupError, usable_cores
from serving.tensorrt_options import BatchProfile
from training.checkpoint import Checkpoint, CheckpointError, save_tensors
from training.data.compose import scenes
from training.data.datasets import Dataset
from training.data.specs import preparation_of
from training.model import CapsNet
from training.provenance import commit, processor
from training.run_folder import TENSORS_FILE

CALIBRATION_IMAGES = 1024
EXPLAIN, DECODER = "explain", "decoder"
ENGINE = "model.plan"


_ALL = Choices()


class Export(NamedTuple):
    """A written artifact, and the reason for each graph that is missing in it."""

    artifact: Artifact
    failures: dict[str, str]


def export_checkpoint(
    checkpoint: Checkpoint,
    dataset: Dataset,
    out: Path,
    name: str,
    version: str,
    choices: Choices = _ALL,
    *,
    tell: Callable[[str], None] = lambda step: None,
) -> Export:
    """Export a checkpoint to ``out/name/version``, verify each graph in the server's runtime, write the manifest last.

    dataset: the data of the checkpoint's training and test. The graphs are compared on its test images, and int8 is
    calibrated on its training images. choices: the content of the artifact; its TensorRT engine is not compared.
    tell: gets a line of text before each step.

    If anything except int8 or fp16 fails, no file remains. ``config.pbtxt`` and ``labels.txt`` are written if this is
    the highest version.

    Raises FileExistsError if that folder is there already; CheckpointError where weights, labels or test images do
    not fit the config, or the figures are not those of the weights; GraphError, TritonError, TensorRTMissing,
    EngineError, RuntimeSetupError and ParityError as the functions called do; OSError where files cannot be written.
    """
    network = checkpoint.model()
    _check_fit(checkpoint, dataset)
    triton.check_labels(checkpoint.labels)
    training = _training(checkpoint, dataset)
    with ArtifactWriter(out, name, version) as writer:
        tell(f"computing {len(dataset.test_images):,} test images in PyTorch, to compare with")
        expected = reference(network, dataset.test_images, dataset.test_labels)
        graphs = _Graphs(writer, _Title(name, version, training), expected, tell)
        graphs.add_all(network, checkpoint, dataset, choices)
        calibrated = graphs.calibrate(checkpoint, dataset)
        save_tensors(checkpoint, writer.folder / TENSORS_FILE)
        writer.add(TENSORS_FILE)
        page = certificate(
            name, version, training, graphs.variants, graphs.graphs, writer.files, graphs.failures, calibrated
        )
        writer.write_text(CERTIFICATE, page)
        artifact = writer.finish(
            Artifact(
                folder=writer.folder,
                name=name,
                version=version,
                labels=checkpoint.labels,
                image_shape=network.config.image_shape,
                pose_size=network.config.digit_dim,
                files=writer.files,
                variants=graphs.variants,
                graphs=graphs.graphs,
                batches=choices.batches,
                training=training,
                preparation=Preparation(**asdict(preparation_of(dataset.name))),
                calibration=calibrated.calibration,
            )
        )
    _write_for_triton(artifact, choices.batches)
    return Export(artifact, graphs.failures)


def _write_for_triton(artifact: Artifact, batches: BatchProfile) -> None:
    """Write Triton's files beside the versions of a model, if the artifact is the highest of them."""
    folder = artifact.folder.parent
    if any(int(other.name) > int(artifact.version) for other in folder.iterdir() if other.name.isdecimal()):
        return
    options = triton.Options(max_batch_size=batches.max, usual_batch_size=batches.opt)
    triton.write(folder, artifact.labels, artifact.image_shape, artifact.pose_size, options)


def calibration_images(dataset: Dataset, count: int = CALIBRATION_IMAGES) -> Tensor:
    """Return training images for the network, uint8 (at most count, C, S, S), the same at each call."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(dataset.train_images), generator=generator)[:count]
    images, labels = dataset.train_images[chosen], dataset.train_labels[chosen]
    return scenes(images, labels, dataset.objects, dataset.canvas, generator)[0] if dataset.canvas else images


@dataclass(frozen=True)
class _Title:
    """The description that every graph of an artifact carries."""

    name: str
    version: str
    training: Training

    def write_into(self, model: onnx.ModelProto, file: str, what: str) -> None:
        """Write the description into a graph. what: the graph's own part of it."""
        training = self.training
        model.doc_string = (
            f"Capsule network {self.name}, version {self.version}, trained on {training.dataset}, {what}."
        )
        properties = {
            "name": self.name,
            "version": self.version,
            "dataset": training.dataset,
            "test_data_sha256": training.test_data_sha256,
            "training_commit": str(training.figures.get("commit", "")),
            "export_commit": training.export_commit,
            "config": json.dumps(training.config),
        }
        onnx.helper.set_model_props(model, properties)
        # Part of the graph's name: TensorRT's engine cache distinguishes models by it and not by their weights.
        model.graph.name = f"{self.name}-{self.version}-{Path(file).stem}"


class _Graphs:
    """The graphs of an artifact: each is written, certified in the server's runtime, and kept for the manifest.

    variants: by precision, the graphs that classify. graphs: by name, the other graphs. failures: by precision, the
    reason why it is missing. Every method raises ParityError if a graph differs too much from PyTorch.
    """

    def __init__(self, writer: ArtifactWriter, title: _Title, expected: Reference, tell: Callable[[str], None]) -> None:
        self._writer, self._title, self._expected, self._tell = writer, title, expected, tell
        self._runtimes: dict[str, Runtime] = {}
        self.variants: dict[str, Variant] = {}
        self.graphs: dict[str, Graph] = {}
        self.failures: dict[str, str] = {}

    def add_all(self, network: CapsNet, checkpoint: Checkpoint, dataset: Dataset, choices: Choices) -> None:
        """Add every graph of a network that was chosen.

        Raises CheckpointError if the figures of the checkpoint are not those of its weights.
        """
        opset = choices.opset
        model = to_onnx(network, opset)
        self.add_variant(PRECISIONS[0], model)
        _check_figures(checkpoint, self.variants[PRECISIONS[0]])
        if choices.engine:  # early, since it is the most likely to fail
            self.add_engine(choices.batches)
        if "int8" not in choices.without:
            self.try_variant("int8", lambda: to_int8(model, calibration_images(dataset)))
        if "fp16" not in choices.without:
            self.try_variant("fp16", lambda: to_fp16(model))
        self.add_explanation(network, opset)
        if network.decoder is not None:
            self.add_decoder(network, opset, choices.decoder_weights)
        self.measure_speeds(dataset.test_images)

    def add_variant(self, precision: str, model: onnx.ModelProto) -> None:
        """Add a graph that classifies."""
        self._tell(f"{precision}: comparing the graph with PyTorch in the server's runtime")
        file = _file(precision)
        path, weights = self._save(file, model, f"in {precision}")
        shared = self._writer.folder / weights if weights else None
        runtime = Runtime(path, "cpu", usable_cores(), quantized=precision == "int8", weights=shared)
        figures = certify(self._expected, runtime, precision)
        rounded = certify_rounded(self._expected, model) if precision == "fp16" else {}
        self.variants[precision] = Variant(file, **figures, rounded=rounded, weights=weights)
        self._runtimes[precision] = runtime

    def try_variant(self, precision: str, make: Callable[[], onnx.ModelProto]) -> None:
        """Add a graph that classifies, or note the reason why it cannot be made or served."""
        self._tell(f"{precision}: converting")
        try:
            self.add_variant(precision, make())
        except GraphError as error:
            self.failures[precision] = f"{precision}: {error}"
        except (ParityError, RuntimeSetupError) as error:
            self._writer.remove(_file(precision))
            self.failures[precision] = str(error)

    def add_engine(self, batches: BatchProfile) -> None:
        """Add a TensorRT engine of the graph in single precision, without a comparison."""
        self._tell("tensorrt: building the engine, which takes minutes")
        folder = self._writer.folder
        build_engine(folder / _file(PRECISIONS[0]), folder / ENGINE, batches)
        self._writer.add(ENGINE)
        self.graphs["tensorrt"] = Graph(ENGINE)

    def add_explanation(self, network: CapsNet, opset: int) -> None:
        """Add the graph that shows its routing."""
        self._tell(f"{EXPLAIN}: comparing the graph that shows the routing")
        model = explanation_to_onnx(network, opset)
        path, weights = self._save(f"{EXPLAIN}.onnx", model, "with its routing")
        certified = certify_explanation(network, path, self._expected)
        self.graphs[EXPLAIN] = replace(certified, receptive_field=receptive_field(network.config), weights=weights)

    def add_decoder(self, network: CapsNet, opset: int, precision: str) -> None:
        """Add the graph that reconstructs. precision: of its stored weights."""
        self._tell(f"{DECODER}: comparing the graph that reconstructs")
        model = decoder_to_onnx(network, opset)
        if precision == "int8":
            model = to_int8_weights(model)
        path, _ = self._save(f"{DECODER}.onnx", model, "its decoder, from a pose to an image")
        self.graphs[DECODER] = certify_decoder(network, path, self._expected, precision)

    def calibrate(self, checkpoint: Checkpoint, dataset: Dataset) -> Calibrated:
        """Calibrate the graph in single precision, after it and the decoder were added."""
        self._tell("calibrating confidences and thresholds")
        decoder = self.graphs.get(DECODER)
        runtime = Runtime(self._writer.folder / decoder.file, "cpu", usable_cores()) if decoder else None
        tested = Prediction(*(array[: len(dataset.test_labels)] for array in self._expected.prediction))
        return calibrate(checkpoint, dataset, Network(self._runtimes[PRECISIONS[0]], runtime), tested)

    def measure_speeds(self, images: Tensor) -> None:
        """Measure all graphs that classify, in turns, on test images, uint8 (B, C, H, W)."""
        self._tell("measuring the speed of each graph")
        measured = speeds(self._runtimes, images)
        device = f"{processor()}, {usable_cores()} threads"
        for precision, variant in self.variants.items():
            size = (self._writer.folder / variant.file).stat().st_size
            self.variants[precision] = replace(
                variant, bytes=size, images_per_second=measured[precision], device=device
            )

    def _save(self, file: str, model: onnx.ModelProto, what: str) -> tuple[Path, str]:
        """Write a graph. Return its path, and the name of the file that it shares weights with, or "" for none."""
        self._title.write_into(model, file, what)
        first = self._writer.folder / MODEL
        written = onnx.ModelProto()
        written.CopyFrom(model)
        weights = MODEL if file != MODEL and share_weights(written, first) else ""
        return self._writer.save_graph(file, written), weights


def _file(precision: str) -> str:
    return MODEL if precision == PRECISIONS[0] else f"{precision}.onnx"


def _check_fit(checkpoint: Checkpoint, dataset: Dataset) -> None:
    """Raise CheckpointError if the network has other image shapes or classes than the data."""
    config = checkpoint.config
    if dataset.image_shape != config.image_shape:
        raise CheckpointError(
            f"the network takes images {config.image_shape}, the test set's are {dataset.image_shape}"
        )
    if len(checkpoint.labels) != config.classes:
        raise CheckpointError(f"the checkpoint has {config.classes} classes but {len(checkpoint.labels)} labels")


def _check_figures(checkpoint: Checkpoint, variant: Variant) -> None:
    measured = {"test_errors": variant.test_errors, "test_images": variant.test_images}
    recorded = {name: checkpoint.figures.get(name) for name in measured}
    if measured != recorded:
        raise CheckpointError(
            f"the checkpoint's figures are not those of its weights: it says {recorded}, measured are {measured}"
        )


def _training(checkpoint: Checkpoint, dataset: Dataset) -> Training:
    """Return the manifest's section on the training run and the data, exactly as it will be read back."""
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
