"""A served version of a model: its artifact and its graphs."""

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path

from serving import artifact as artifacts
from serving.artifact import Artifact
from serving.errors import UnknownModel
from serving.logs import counted
from serving.metrics.registry import CLASSIFY, Metrics
from serving.repository.classifier import Classifier
from serving.repository.further_graph import FurtherGraph
from serving.repository.served_graph import ServedGraph
from serving.repository.tuning import Plan
from serving.runtime import RuntimeSetupError
from serving.settings import Settings

_MAX_LOGGED_CLASSES = 10

_logger = logging.getLogger(__name__)


class ServedModel:
    """A version that is loaded, verified, tuned and warm. The constructor blocks. ``start`` starts to take requests.

    graphs: the names of the graphs that the services need. Every model has ``classify``. The others are opened if the
        artifact has them. Graphs that are not named are not opened.
    plan: the plan of another version of this model, to use again: a measurement beside a busy server would only show
        its load.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        metrics: Metrics,
        plan: Plan | None = None,
        graphs: Iterable[str] = (CLASSIFY,),
    ) -> None:
        """Load a version. Raises ArtifactError and RuntimeSetupError."""
        self.artifact: Artifact = artifacts.load(folder, settings.max_model_bytes)
        self.settings = settings
        self._check_pixels(folder)
        most = self.artifact.batches.max
        if settings.device == "tensorrt" and settings.max_batch > most:
            raise RuntimeSetupError(
                f"max_batch: {settings.max_batch}; this model was exported for batches of up to {most} in TensorRT"
            )
        self._metrics = metrics
        #: The graph that every model has.
        self.classify = ServedGraph(Classifier(self.artifact, settings), settings, plan)
        #: The open graphs by name.
        self.graphs = {CLASSIFY: self.classify}
        for name in sorted(self.artifact.graphs.keys() & set(graphs)):
            source = FurtherGraph(name, self.artifact, settings)
            # The plan of the network applies, since further graphs are a part of it, and measuring each would delay the
            # start.
            self.graphs[name] = ServedGraph(source, settings, self.classify.plan)
        self._in_use = 0
        self._unused = asyncio.Event()

    def _check_pixels(self, folder: Path) -> None:
        _, height, width = self.artifact.image_shape
        if (pixels := height * width) > (limit := self.settings.max_image_pixels):
            raise RuntimeSetupError(f"{folder}: images of {pixels} pixels; the limit is {limit} (max_image_pixels)")

    def graph(self, name: str) -> ServedGraph:
        """Return an open graph. Raises UnknownModel if the model does not have it."""
        try:
            return self.graphs[name]
        except KeyError:
            raise UnknownModel(
                f"model_name: {self.artifact.name!r} version {self.artifact.version!r} has no graph {name!r}; "
                f"there is: {', '.join(self.graphs)}"
            ) from None

    def start(self) -> None:
        """Start to take requests. Call it on the event loop that serves them."""
        name, version = self.artifact.name, self.artifact.version
        for graph in self.graphs.values():
            graph.start(self._metrics, name, version)
        self._metrics.model_info.labels(*self._info).read(lambda: 1)
        self._metrics.model_ready.labels(name, version).read(lambda: 1)

    def acquire(self) -> None:
        """Keep the model open for one request, until ``release``."""
        self._in_use += 1

    def release(self) -> None:
        """Note that a request has ended."""
        self._in_use -= 1
        if not self._in_use:
            self._unused.set()

    async def close(self) -> None:
        """End the threads when no request uses the model."""
        while self._in_use:
            self._unused.clear()
            await self._unused.wait()
        for graph in self.graphs.values():
            await graph.close()

    def withdraw(self, successor: "ServedModel") -> None:
        """Remove the metrics of this version only, since another one with the same name and version has taken over."""
        if self._info != successor._info:
            info = self._metrics.model_info
            info.remove(dict(zip(info.declaration.labels, self._info, strict=True)))

    def announce(self) -> None:
        """Log the version, its classes and its plan, one line each."""
        artifact, precision = self.artifact, self.settings.precision
        channels, height, width = artifact.image_shape
        _logger.info(
            "%s version %s in %s: %d x %d images of %s, poses of %d numbers, test error %s",
            artifact.name,
            artifact.version,
            precision,
            width,
            height,
            counted(channels, "channel"),
            artifact.pose_size,
            artifact.test_error(precision),
        )
        shown, others = artifact.labels[:_MAX_LOGGED_CLASSES], artifact.labels[_MAX_LOGGED_CLASSES:]
        further = f" and {len(others)} more" if others else ""
        _logger.info(
            "%s: %s: %s%s", artifact.name, counted(len(artifact.labels), "class", "classes"), ", ".join(shown), further
        )
        for graph in self.graphs.values():
            graph.announce()

    @property
    def _info(self) -> tuple[str, ...]:
        artifact, precision = self.artifact, self.settings.precision
        return artifact.name, artifact.version, artifact.training.dataset, precision, artifact.sha256(precision)
