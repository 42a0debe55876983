"""``inference.GRPCInferenceService``: the Open Inference Protocol and Triton's extensions.

Requests for inference go to the pipeline. All other requests are answered from the repository.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from importlib.metadata import version

from protos.inference import inference_pb2 as pb
from serving.errors import InvalidRequest, UnknownModel
from serving.metrics.registry import CLASSIFY, Metrics
from serving.metrics.triton_statistics import Duration
from serving.repository.classifier import IMAGES, PROBABILITIES
from serving.repository.repository import Repository, State
from serving.repository.served_model import ServedModel
from serving.rpc.edge import Call, Edge, parse, parse_names
from serving.runtime import CPU
from serving.services.graphs import DECODER, EXPLAIN
from serving.services.infer_outputs import ALWAYS, output_shapes
from serving.services.infer_queries import (
    InferCodec,
    StreamedComputedInferQuery,
    StreamedInferQuery,
    infer_query,
    streamed_infer_query,
)
from serving.services.open_inference_codec import read_request
from serving.services.per_model import PerModel
from serving.services.pipeline import Pipeline
from serving.services.protobuf_wire import check_fields, fields_of
from serving.services.stream import StreamRefusals
from serving.services.tensor_inputs import DATATYPES, UINT8, Received
from serving.services.unsupported import ELSEWHERE, LACKING, refusals
from serving.settings import Settings
from serving.transport.methods import Method, table

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_METHODS = tuple(pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name)
NAME = "capsnet-serving"
PLATFORM, BACKEND = "onnxruntime_onnx", "onnxruntime"
LABELS = "labels.txt"
#: In a configuration, the beginning of the parameters that name optional outputs, and the parameter with the data types
#: of the input.
OPTIONAL_OUTPUT, INPUT_DATATYPES = "optional_output.", "input_datatypes"
EXTENSIONS = (
    "classification",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
)
_MAX_FIELDS = 4096  # the most fields of a RepositoryModelLoadRequest; a usual one has one
_LOAD_FIELDS = fields_of(pb.RepositoryModelLoadRequest)
_MAX_SHOWN_CHARACTERS = 64  # the most characters of a client's name in an error


class InferenceService:
    """The protocol's service, without the methods that change the repository."""

    #: The graphs of each model that the service needs.
    GRAPHS = (CLASSIFY, EXPLAIN, DECODER)

    def __init__(self, pipeline: Pipeline, edge: Edge, metrics: Metrics, settings: Settings) -> None:
        self._pipeline = pipeline
        self._repository = pipeline.repository
        self._edge = edge
        self._settings = settings
        self._max_bytes = settings.max_request_bytes
        self._version = version(NAME)
        self._codecs = PerModel(lambda model: InferCodec.of(model.artifact, settings))
        self._refuse = StreamRefusals(edge, metrics, SERVICE, "ModelStreamInfer")

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
        return table(SERVICE, refusals(self._edge, SERVICE, LACKING) | methods)

    async def server_live(self, data: bytes, call: Call) -> bytes:
        """Return a ServerLiveResponse."""
        return pb.ServerLiveResponse(live=True).SerializeToString()

    async def server_ready(self, data: bytes, call: Call) -> bytes:
        """Return a ServerReadyResponse: ready while a model is served and the server does not stop."""
        ready = self._edge.ready and bool(self._repository.models())
        return pb.ServerReadyResponse(ready=ready).SerializeToString()

    async def model_ready(self, data: bytes, call: Call) -> bytes:
        """Answer a ModelReadyRequest. Raises InvalidRequest."""
        request = parse_names(data, pb.ModelReadyRequest, self._max_bytes)
        try:
            self._repository.get(request.name, request.version)
        except UnknownModel:
            return pb.ModelReadyResponse(ready=False).SerializeToString()
        return pb.ModelReadyResponse(ready=True).SerializeToString()

    async def server_metadata(self, data: bytes, call: Call) -> bytes:
        """Return a ServerMetadataResponse."""
        extensions = [*EXTENSIONS, "model_repository"] if self._settings.admin_port >= 0 else EXTENSIONS
        response = pb.ServerMetadataResponse(name=NAME, version=self._version, extensions=extensions)
        return response.SerializeToString()

    async def model_metadata(self, data: bytes, call: Call) -> bytes:
        """Answer a ModelMetadataRequest. Raises InvalidRequest and UnknownModel."""
        request = parse_names(data, pb.ModelMetadataRequest, self._max_bytes)
        artifact = self._repository.get(request.name, request.version).artifact
        shapes = output_shapes(artifact)
        response = pb.ModelMetadataResponse(name=artifact.name, versions=self._versions(artifact.name))
        response.platform = PLATFORM
        response.inputs.add(name=IMAGES, datatype=UINT8, shape=(-1, *artifact.image_shape))
        for name in ALWAYS:
            response.outputs.add(name=name, datatype="FP32", shape=(-1, *shapes[name]))
        return response.SerializeToString()

    def model_infer(self, data: bytes, call: Call) -> None:
        """Answer a ModelInferRequest. Raises InvalidRequest and UnknownModel."""
        received = read_request(data, self._max_bytes)
        self._pipeline.begin(infer_query(received, len(data), self._codecs), call)

    def model_stream_infer(self, messages: AsyncIterator[bytes], call: Call) -> AsyncGenerator[bytes]:
        """Answer ModelInferRequests with ModelStreamInferResponses."""
        return self._pipeline.answer_stream(messages, self._parse_streamed, call, self._refuse)

    async def model_config(self, data: bytes, call: Call) -> bytes:
        """Answer a ModelConfigRequest. Raises InvalidRequest and UnknownModel."""
        request = parse_names(data, pb.ModelConfigRequest, self._max_bytes)
        model = self._repository.get(request.name, request.version)
        return pb.ModelConfigResponse(config=self._config(model)).SerializeToString()

    async def model_statistics(self, data: bytes, call: Call) -> bytes:
        """Answer a ModelStatisticsRequest. Raises UnknownModel."""
        request = parse_names(data, pb.ModelStatisticsRequest, self._max_bytes)
        models = [
            model
            for model in self._repository.models()
            if request.name in ("", model.artifact.name) and request.version in ("", model.artifact.version)
        ]
        if request.name and not models:
            self._repository.get(request.name, request.version)  # its error names the served models
        return pb.ModelStatisticsResponse(model_stats=map(_statistics, models)).SerializeToString()

    async def repository_index(self, data: bytes, call: Call) -> bytes:
        """Answer a RepositoryIndexRequest. Raises InvalidRequest."""
        return _index(parse_names(data, pb.RepositoryIndexRequest, self._max_bytes), self._repository)

    def _versions(self, name: str) -> list[str]:
        """Return the served versions of a model, the lowest first."""
        served = (model.artifact for model in self._repository.models())
        return sorted((artifact.version for artifact in served if artifact.name == name), key=int)

    def _config(self, model: ServedModel) -> pb.ModelConfig:
        artifact, settings, classify = model.artifact, model.settings, model.classify
        shapes = output_shapes(artifact)
        config = pb.ModelConfig(
            name=artifact.name,
            platform=PLATFORM,
            backend=BACKEND,
            default_model_filename=artifact.file(settings.precision).name,
            # Clients take it for the most images of a request. A larger request is computed in several batches.
            max_batch_size=settings.max_images_per_request,
        )
        config.input.add(name=IMAGES, data_type=pb.TYPE_UINT8, dims=artifact.image_shape)
        for name in ALWAYS:
            labels = LABELS if name == PROBABILITIES else ""
            config.output.add(name=name, data_type=pb.TYPE_FP32, dims=shapes[name], label_filename=labels)
        # Not as outputs: Triton's tools ask for all of these, and each map of relevance takes some 200 images.
        for name, shape in shapes.items():
            if name not in ALWAYS:
                config.parameters[OPTIONAL_OUTPUT + name].string_value = f"FP32 {list(shape)}"
        config.parameters[INPUT_DATATYPES].string_value = ", ".join(DATATYPES)
        on_cpu = classify.runtime.provider == CPU
        kind = pb.ModelInstanceGroup.KIND_CPU if on_cpu else pb.ModelInstanceGroup.KIND_GPU
        config.instance_group.add(kind=kind, count=classify.plan.runtimes)
        config.dynamic_batching.preferred_batch_size.append(classify.plan.max_batch)
        config.dynamic_batching.priority_levels = 2
        config.dynamic_batching.default_priority_level = 2
        return config

    def _parse_streamed(self, data: bytes) -> StreamedInferQuery | StreamedComputedInferQuery:
        try:
            received = read_request(data, self._max_bytes)
        except InvalidRequest as error:
            return StreamedInferQuery(Received(pb.ModelInferRequest()), 0, self._codecs, error.alone())
        return streamed_infer_query(received, len(data), self._codecs)


class AdminService:
    """The methods that change the repository, and its index, for a separate port."""

    def __init__(self, repository: Repository, edge: Edge, settings: Settings) -> None:
        self._repository = repository
        self._edge = edge
        self._max_bytes = settings.max_request_bytes

    def methods(self) -> dict[str, Method]:
        """Return the service's part of the method table."""
        unary = {"RepositoryIndex": self.index, "RepositoryModelLoad": self.load, "RepositoryModelUnload": self.unload}
        methods: dict[str, Method] = {name: self._edge.unary(SERVICE, name, answer) for name, answer in unary.items()}
        return table(SERVICE, refusals(self._edge, SERVICE, dict.fromkeys(_METHODS, ELSEWHERE) | LACKING) | methods)

    async def index(self, data: bytes, call: Call) -> bytes:
        """Answer a RepositoryIndexRequest. Raises InvalidRequest."""
        return _index(parse_names(data, pb.RepositoryIndexRequest, self._max_bytes), self._repository)

    async def load(self, data: bytes, call: Call) -> bytes:
        """Answer a RepositoryModelLoadRequest. Raises InvalidRequest and LoadError."""
        check_fields(data, _MAX_FIELDS, _LOAD_FIELDS)
        request = parse(data, pb.RepositoryModelLoadRequest, self._max_bytes)
        _check_repository(request.repository_name)
        for name in request.parameters:
            if name == "config" or name.startswith("file:"):
                field = f'parameters["{name[:_MAX_SHOWN_CHARACTERS]}"]'
                raise InvalidRequest(field, "not supported; expected none, a model is what its folder has")
        await self._repository.load(_model_name(request.model_name))
        call.note(f"the model {request.model_name!r} was loaded for a client")
        return pb.RepositoryModelLoadResponse().SerializeToString()

    async def unload(self, data: bytes, call: Call) -> bytes:
        """Answer a RepositoryModelUnloadRequest. Raises InvalidRequest and UnknownModel."""
        request = parse_names(data, pb.RepositoryModelUnloadRequest, self._max_bytes)
        _check_repository(request.repository_name)
        await self._repository.unload(_model_name(request.model_name))
        call.note(f"the model {request.model_name!r} was unloaded for a client")
        return pb.RepositoryModelUnloadResponse().SerializeToString()


def _index(request: pb.RepositoryIndexRequest, repository: Repository) -> bytes:
    _check_repository(request.repository_name)
    response = pb.RepositoryIndexResponse()
    for entry in repository.index():
        if entry.state == State.READY or not request.ready:
            response.models.add(name=entry.name, version=entry.version, state=entry.state, reason=entry.reason)
    return response.SerializeToString()


def _check_repository(name: str) -> None:
    if name:
        raise InvalidRequest(
            "repository_name", f"{name[:_MAX_SHOWN_CHARACTERS]!r}; expected none, since there is one repository"
        )


def _model_name(name: str) -> str:
    """Return the name of a model. Raises InvalidRequest if it would lead out of the repository's folder."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise InvalidRequest(
            "model_name", f"{name[:_MAX_SHOWN_CHARACTERS]!r}; expected the name of a folder in the repository"
        )
    return name


def _statistics(model: ServedModel) -> pb.ModelStatistics:
    statistics = model.classify.metrics.statistics
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
