"""``inference.GRPCInferenceService``: the Open Inference Protocol and Triton's extensions, as a translation.

Requests for inference go onto the pipeline; what else a client asks is answered from the repository.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from importlib.metadata import version

import grpc

from protos.inference import inference_pb2 as pb
from serving.batching.batcher import Images
from serving.errors import InvalidRequest, UnknownModel
from serving.metrics.registry import Metrics
from serving.metrics.triton_statistics import Duration
from serving.repository.repository import Repository, State
from serving.repository.served_model import ServedModel
from serving.rpc.edge import Call, Edge, parse
from serving.runtime import CPU, Answer
from serving.services.open_inference_codec import INPUT, POSES, PROBABILITIES, refused, schedule
from serving.services.pipeline import Pipeline
from serving.settings import Settings
from serving.transport.methods import Method, table

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
NAME = "capsnet-serving"
PLATFORM, BACKEND = "onnxruntime_onnx", "onnxruntime"
LABELS = "labels.txt"
EXTENSIONS = (
    "classification",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
)
# From this size on, a request whose pixels are no bytes is decoded beside the event loop.
_SLOW_BYTES = 16384
_SHOWN = 64  # characters of a name that a client sent


class InferenceService:
    """The protocol, but for what changes the repository."""

    def __init__(self, pipeline: Pipeline, edge: Edge, metrics: Metrics, settings: Settings) -> None:
        self._pipeline = pipeline
        self._repository = pipeline.repository
        self._edge = edge
        self._settings = settings
        self._max_bytes = settings.max_request_bytes
        self._version = version(NAME)
        self._stream_errors = {
            code: metrics.stream_errors.labels("bidi_stream", SERVICE, "ModelStreamInfer", code.name)
            for code in grpc.StatusCode
        }

    def methods(self) -> dict[str, Method]:
        """Return the service's part of the method table."""
        unary = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ModelReady": self.model_ready,
            "ServerMetadata": self.server_metadata,
            "ModelMetadata": self.model_metadata,
            "ModelConfig": self.model_config,
            "ModelStatistics": self.model_statistics,
            "RepositoryIndex": self.repository_index,
        }
        methods: dict[str, Method] = {name: self._edge.unary(SERVICE, name, answer) for name, answer in unary.items()}
        methods["ModelInfer"] = self._edge.unary_at_once(
            SERVICE, "ModelInfer", self.model_infer, partial(self._pipeline.refusal, urgent=True)
        )
        methods["ModelStreamInfer"] = self._edge.stream(SERVICE, "ModelStreamInfer", self.model_stream_infer)
        return table(SERVICE, methods)

    async def server_live(self, data: bytes, call: Call) -> bytes:
        """A ServerLiveResponse."""
        return pb.ServerLiveResponse(live=True).SerializeToString()

    async def server_ready(self, data: bytes, call: Call) -> bytes:
        """A ServerReadyResponse: ready where a model is served, and until the server begins to stop."""
        ready = self._edge.ready and bool(self._repository.models())
        return pb.ServerReadyResponse(ready=ready).SerializeToString()

    async def model_ready(self, data: bytes, call: Call) -> bytes:
        """A ModelReadyRequest to a ModelReadyResponse. Raises InvalidRequest."""
        request = parse(data, pb.ModelReadyRequest, self._max_bytes)
        try:
            self._repository.get(request.name, request.version)
        except UnknownModel:
            return pb.ModelReadyResponse(ready=False).SerializeToString()
        return pb.ModelReadyResponse(ready=True).SerializeToString()

    async def server_metadata(self, data: bytes, call: Call) -> bytes:
        """A ServerMetadataResponse."""
        extensions = [*EXTENSIONS, "model_repository"] if self._settings.admin_port >= 0 else EXTENSIONS
        response = pb.ServerMetadataResponse(name=NAME, version=self._version, extensions=extensions)
        return response.SerializeToString()

    async def model_metadata(self, data: bytes, call: Call) -> bytes:
        """A ModelMetadataRequest to a ModelMetadataResponse. Raises InvalidRequest and UnknownModel."""
        request = parse(data, pb.ModelMetadataRequest, self._max_bytes)
        artifact = self._repository.get(request.name, request.version).artifact
        classes = len(artifact.labels)
        response = pb.ModelMetadataResponse(name=artifact.name, versions=self._versions(artifact.name))
        response.platform = PLATFORM
        response.inputs.add(name=INPUT, datatype="UINT8", shape=(-1, *artifact.image_shape))
        response.outputs.add(name=PROBABILITIES, datatype="FP32", shape=(-1, classes))
        response.outputs.add(name=POSES, datatype="FP32", shape=(-1, classes, artifact.pose_size))
        return response.SerializeToString()

    def model_infer(self, data: bytes, call: Call) -> None:
        """A ModelInferRequest to a ModelInferResponse. Raises InvalidRequest and UnknownModel."""
        self._pipeline.begin(_Item(parse(data, pb.ModelInferRequest, self._max_bytes), len(data)), call)

    def model_stream_infer(self, messages: AsyncIterator[bytes], call: Call) -> AsyncGenerator[bytes]:
        """ModelInferRequests to ModelStreamInferResponses."""
        return self._pipeline.answer_stream(messages, self._open, call)

    async def model_config(self, data: bytes, call: Call) -> bytes:
        """A ModelConfigRequest to a ModelConfigResponse. Raises InvalidRequest and UnknownModel."""
        request = parse(data, pb.ModelConfigRequest, self._max_bytes)
        model = self._repository.get(request.name, request.version)
        return pb.ModelConfigResponse(config=self._config(model)).SerializeToString()

    async def model_statistics(self, data: bytes, call: Call) -> bytes:
        """A ModelStatisticsRequest to a ModelStatisticsResponse. Raises UnknownModel."""
        request = parse(data, pb.ModelStatisticsRequest, self._max_bytes)
        models = [
            model
            for model in self._repository.models()
            if request.name in ("", model.artifact.name) and request.version in ("", model.artifact.version)
        ]
        if request.name and not models:
            self._repository.get(request.name, request.version)  # tells what there is
        return pb.ModelStatisticsResponse(model_stats=map(_statistics, models)).SerializeToString()

    async def repository_index(self, data: bytes, call: Call) -> bytes:
        """A RepositoryIndexRequest to a RepositoryIndexResponse. Raises InvalidRequest."""
        return _index(parse(data, pb.RepositoryIndexRequest, self._max_bytes), self._repository)

    def refusal(self, error: Exception, call: Call, seconds: float) -> str:
        """What the client of a stream is told of a request that cannot be answered."""
        code, text = self._edge.to_status(error)
        call.refused(seconds, code, text)
        self._stream_errors[code].inc()
        return text

    def _versions(self, name: str) -> list[str]:
        """Those of the model that are served, the lowest first."""
        served = (model.artifact for model in self._repository.models())
        return sorted((artifact.version for artifact in served if artifact.name == name), key=int)

    def _config(self, model: ServedModel) -> pb.ModelConfig:
        artifact, settings = model.artifact, model.settings
        classes = len(artifact.labels)
        config = pb.ModelConfig(
            name=artifact.name,
            platform=PLATFORM,
            backend=BACKEND,
            default_model_filename=artifact.file(settings.precision).name,
            # Of a request, as clients take it; what is more than a batch is computed in several.
            max_batch_size=settings.max_images_per_request,
        )
        config.input.add(name=INPUT, data_type=pb.TYPE_UINT8, dims=artifact.image_shape)
        config.output.add(name=PROBABILITIES, data_type=pb.TYPE_FP32, dims=(classes,), label_filename=LABELS)
        config.output.add(name=POSES, data_type=pb.TYPE_FP32, dims=(classes, artifact.pose_size))
        on_cpu = model.runtime.provider == CPU
        kind = pb.ModelInstanceGroup.KIND_CPU if on_cpu else pb.ModelInstanceGroup.KIND_GPU
        config.instance_group.add(kind=kind, count=model.plan.runtimes)
        config.dynamic_batching.preferred_batch_size.append(model.plan.max_batch)
        config.dynamic_batching.priority_levels = 2
        config.dynamic_batching.default_priority_level = 2
        return config

    def _open(self, data: bytes) -> "_StreamItem":
        try:
            message = parse(data, pb.ModelInferRequest, self._max_bytes)
        except InvalidRequest as error:
            return _StreamItem(pb.ModelInferRequest(), 0, self, error)
        return _StreamItem(message, len(data), self)


class AdminService:
    """What changes the repository, and its index: for a port of its own."""

    def __init__(self, repository: Repository, edge: Edge, settings: Settings) -> None:
        self._repository = repository
        self._edge = edge
        self._max_bytes = settings.max_request_bytes

    def methods(self) -> dict[str, Method]:
        """Return the service's part of the method table."""
        unary = {"RepositoryIndex": self.index, "RepositoryModelLoad": self.load, "RepositoryModelUnload": self.unload}
        methods: dict[str, Method] = {name: self._edge.unary(SERVICE, name, answer) for name, answer in unary.items()}
        return table(SERVICE, methods)

    async def index(self, data: bytes, call: Call) -> bytes:
        """A RepositoryIndexRequest to a RepositoryIndexResponse. Raises InvalidRequest."""
        return _index(parse(data, pb.RepositoryIndexRequest, self._max_bytes), self._repository)

    async def load(self, data: bytes, call: Call) -> bytes:
        """A RepositoryModelLoadRequest to its response. Raises InvalidRequest and LoadError."""
        request = parse(data, pb.RepositoryModelLoadRequest, self._max_bytes)
        _check_repository(request.repository_name)
        for name in request.parameters:
            if name == "config" or name.startswith("file:"):
                field = f'parameters["{name[:_SHOWN]}"]'
                raise InvalidRequest(field, "not supported; expected none, a model is what its folder has")
        await self._repository.load(_model_name(request.model_name))
        return pb.RepositoryModelLoadResponse().SerializeToString()

    async def unload(self, data: bytes, call: Call) -> bytes:
        """A RepositoryModelUnloadRequest to its response. Raises InvalidRequest and UnknownModel."""
        request = parse(data, pb.RepositoryModelUnloadRequest, self._max_bytes)
        _check_repository(request.repository_name)
        await self._repository.unload(_model_name(request.model_name))
        return pb.RepositoryModelUnloadResponse().SerializeToString()


class _Item:
    """A ModelInferRequest of so many bytes. Raises InvalidRequest."""

    def __init__(self, request: pb.ModelInferRequest, size: int) -> None:
        self._request = request
        self.model_name = request.model_name
        self.model_version = request.model_version
        self.timeout, self.urgent = schedule(request)
        self.images = request.inputs[0].shape[0] if request.inputs and request.inputs[0].shape else 0
        self.slow = size >= _SLOW_BYTES and not request.raw_input_contents

    def decode(self, model: ServedModel) -> Images:
        self._outputs = model.tensors.outputs(self._request)
        return model.tensors.images(self._request)

    def encode(self, model: ServedModel, prediction: Answer) -> bytes:
        return model.tensors.encode(self._request.id, self._outputs, prediction)


class _StreamItem(_Item):
    """A ModelInferRequest of a stream; error: why it could not be parsed."""

    def __init__(
        self, request: pb.ModelInferRequest, size: int, service: InferenceService, error: InvalidRequest | None = None
    ) -> None:
        self.error: Exception | None = error
        self._service = service
        try:
            super().__init__(request, size)
        except InvalidRequest as wrong:
            self.error = wrong
            self.images = 0

    def encode(self, model: ServedModel, prediction: Answer) -> bytes:
        return model.tensors.encode_for_stream(self._request.id, self._outputs, prediction)

    def encode_error(self, error: Exception, call: Call, seconds: float) -> bytes:
        return refused(self._request.id, self._service.refusal(error, call, seconds))


def _index(request: pb.RepositoryIndexRequest, repository: Repository) -> bytes:
    _check_repository(request.repository_name)
    response = pb.RepositoryIndexResponse()
    for entry in repository.index():
        if entry.state == State.READY or not request.ready:
            response.models.add(name=entry.name, version=entry.version, state=entry.state, reason=entry.reason)
    return response.SerializeToString()


def _check_repository(name: str) -> None:
    if name:
        raise InvalidRequest("repository_name", f"{name[:_SHOWN]!r}; expected none, since there is one repository")


def _model_name(name: str) -> str:
    """Raises InvalidRequest where it would lead out of the repository's folder."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise InvalidRequest("model_name", f"{name[:_SHOWN]!r}; expected the name of a folder in the repository")
    return name


def _statistics(model: ServedModel) -> pb.ModelStatistics:
    statistics = model.metrics.statistics
    return pb.ModelStatistics(
        name=model.artifact.name,
        version=model.artifact.version,
        last_inference=statistics.last_inference,
        inference_count=statistics.inference_count,
        execution_count=statistics.execution_count,
        inference_stats=pb.InferStatistics(
            success=_duration(statistics.success),
            fail=_duration(statistics.fail),
            queue=_duration(statistics.queue),
            compute_input=_duration(statistics.compute_input),
            compute_infer=_duration(statistics.compute_infer),
            compute_output=_duration(statistics.compute_output),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=size,
                compute_input=_duration(batch.compute_input),
                compute_infer=_duration(batch.compute_infer),
            )
            for size, batch in sorted(statistics.batches.items())
        ],
    )


def _duration(duration: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=duration.count, ns=duration.ns)
