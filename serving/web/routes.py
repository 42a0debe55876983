"""The route table: each path of HTTP, the method of gRPC behind it, and the conversions of its messages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import NamedTuple

from google.protobuf.message import Message

from protos.capsnet.v1 import capsnet_pb2 as capsnet
from protos.inference import inference_pb2 as inference
from serving.web.forms import PICTURES, from_pictures, from_query
from serving.web.incoming import JSON, Incoming, Reply
from serving.web.json_messages import Json, to_json, write_json
from serving.web.json_requests import read_message
from serving.web.tensors import read_infer, take_binary, write_infer

_CAPSNET = "/capsnet.v1.CapsNetService/"
_INFERENCE = "/inference.GRPCInferenceService/"
#: The method that writes the descriptions of the routes, which this package itself answers.
DESCRIBE, DOCUMENT = "/http/OpenApi", "/http/Documentation"
_PNG = PICTURES[0]


class Prepared(NamedTuple):
    """A request that is ready for its method. write: makes the answer of the method's bytes."""

    message: Message
    write: Callable[[bytes], Reply]


class Body(Enum):
    """The kinds of body."""

    NONE = "none"
    #: A message in JSON, or none at all.
    MESSAGE = "message"
    #: Pictures, a form with pictures, or a message in JSON.
    PICTURES = "pictures"
    #: A request of the Open Inference Protocol.
    TENSORS = "tensors"


class Answer(Enum):
    """The kinds of answer."""

    MESSAGE = "message"
    #: A message, or a picture if the client accepts one.
    PICTURE = "picture"
    TENSORS = "tensors"
    #: The models of the repository as a list.
    INDEX = "index"
    #: The configuration of a model, without a message around it.
    CONFIGURATION = "configuration"
    #: A model's readiness, as the status of HTTP too.
    READINESS = "readiness"


@dataclass(frozen=True)
class Route:
    """A path of HTTP and its method.

    verb: GET or POST. path: a pattern of Starlette. method: a path of the method table.
    """

    verb: str
    path: str
    method: str
    summary: str
    request: type[Message]
    response: type[Message]
    body: Body = Body.NONE
    answer: Answer = Answer.MESSAGE

    @property
    def places(self) -> list[str]:
        """Return the names of the parameters in the path."""
        return [part[1:-1] for part in self.path.split("/") if part.startswith("{")]

    def prepare(self, incoming: Incoming) -> Prepared:
        """Return the request for the method, and the writer of its answer. Raises Problem."""
        match self.body:
            case Body.NONE:
                message: Message = from_query(incoming, self.request)
            case Body.MESSAGE:
                message = read_message(incoming.body or b"{}", self.request, 0)
            case Body.PICTURES:
                message = from_pictures(incoming, self.request)
            case Body.TENSORS:
                return _prepare_infer(incoming)
        if self.answer is Answer.PICTURE:
            return _prepare_picture(message, incoming)
        bodiless = replace(incoming, body=b"")  # since the body's memory is needed until then
        return Prepared(message, partial(_WRITERS[self.answer], self.response, bodiless))


def _prepare_infer(incoming: Incoming) -> Prepared:
    request = read_infer(incoming, incoming.place["name"], incoming.place.get("version", ""))
    everywhere, chosen = take_binary(request)
    return Prepared(
        request, lambda data: write_infer(inference.ModelInferResponse.FromString(data), everywhere, chosen)
    )


def _prepare_picture(message: Message, incoming: Incoming) -> Prepared:
    """Return a ReconstructRequest. If the client accepts pictures and no JSON, a single one is its whole answer."""
    assert isinstance(message, capsnet.ReconstructRequest)
    as_picture = incoming.accepts(_PNG) and not incoming.accepts(JSON)
    if as_picture:
        message.format = capsnet.FORMAT_PNG

    def write(data: bytes) -> Reply:
        response = capsnet.ReconstructResponse.FromString(data)
        if as_picture and len(response.results) == 1:
            return Reply(response.results[0].image, _PNG)
        return Reply(write_json(to_json(response)))

    return Prepared(message, write)


def _message(kind: type[Message], incoming: Incoming, data: bytes) -> Reply:
    return Reply(write_json(to_json(kind.FromString(data))))


def _index(kind: type[Message], incoming: Incoming, data: bytes) -> Reply:
    models: list[Json] = [to_json(model) for model in inference.RepositoryIndexResponse.FromString(data).models]
    return Reply(write_json(models))


def _configuration(kind: type[Message], incoming: Incoming, data: bytes) -> Reply:
    return Reply(write_json(to_json(inference.ModelConfigResponse.FromString(data).config)))


def _readiness(kind: type[Message], incoming: Incoming, data: bytes) -> Reply:
    ready = inference.ModelReadyResponse.FromString(data).ready
    return Reply(write_json({"name": incoming.place["name"], "ready": ready}), status=200 if ready else 503)


_WRITERS: dict[Answer, Callable[[type[Message], Incoming, bytes], Reply]] = {
    Answer.MESSAGE: _message,
    Answer.INDEX: _index,
    Answer.CONFIGURATION: _configuration,
    Answer.READINESS: _readiness,
}


def _capsnet(
    verb: str,
    path: str,
    name: str,
    summary: str,
    request: type[Message],
    response: type[Message],
    body: Body = Body.NONE,
    answer: Answer = Answer.MESSAGE,
) -> Route:
    return Route(verb, path, _CAPSNET + name, summary, request, response, body, answer)


def _of_models(
    path: str,
    name: str,
    summary: str,
    request: type[Message],
    response: type[Message],
    answer: Answer = Answer.MESSAGE,
    verb: str = "GET",
    body: Body = Body.NONE,
) -> Sequence[Route]:
    """Return the routes of a model, and of one of its versions."""
    return tuple(
        Route(
            verb, f"/v2/models/{{name}}{place}{path}", _INFERENCE + name, summary + end, request, response, body, answer
        )
        for place, end in (("", ""), ("/versions/{version}", ", of one version"))
    )


ROUTES: Sequence[Route] = (
    _capsnet(
        "POST", "/v1/classify", "Classify", "Classify pictures",
        capsnet.ClassifyRequest, capsnet.ClassifyResponse, Body.PICTURES,
    ),
    _capsnet(
        "POST", "/v1/explain", "Explain", "Explain the answers to pictures",
        capsnet.ExplainRequest, capsnet.ExplainResponse, Body.PICTURES,
    ),
    _capsnet(
        "POST", "/v1/reconstruct", "Reconstruct", "Draw what the network has seen in a picture, or given poses",
        capsnet.ReconstructRequest, capsnet.ReconstructResponse, Body.PICTURES, Answer.PICTURE,
    ),
    _capsnet(
        "GET", "/v1/model", "GetModel", "Describe a model", capsnet.GetModelRequest, capsnet.GetModelResponse
    ),
    Route(
        "GET", "/v1/models", f"{_INFERENCE}RepositoryIndex", "List the models",
        inference.RepositoryIndexRequest, inference.RepositoryIndexResponse,
    ),
    Route(
        "GET", "/v2", f"{_INFERENCE}ServerMetadata", "Describe the server",
        inference.ServerMetadataRequest, inference.ServerMetadataResponse,
    ),
    *_of_models(
        "", "ModelMetadata", "Describe a model's tensors",
        inference.ModelMetadataRequest, inference.ModelMetadataResponse,
    ),
    *_of_models(
        "/ready", "ModelReady", "Tell if a model takes requests",
        inference.ModelReadyRequest, inference.ModelReadyResponse, Answer.READINESS,
    ),
    *_of_models(
        "/config", "ModelConfig", "Return a model's configuration",
        inference.ModelConfigRequest, inference.ModelConfigResponse, Answer.CONFIGURATION,
    ),
    *_of_models(
        "/stats", "ModelStatistics", "Count a model's requests",
        inference.ModelStatisticsRequest, inference.ModelStatisticsResponse,
    ),
    Route(
        "GET", "/v2/models/stats", f"{_INFERENCE}ModelStatistics", "Count the requests of all models",
        inference.ModelStatisticsRequest, inference.ModelStatisticsResponse,
    ),
    *_of_models(
        "/infer", "ModelInfer", "Compute tensors",
        inference.ModelInferRequest, inference.ModelInferResponse, Answer.TENSORS, "POST", Body.TENSORS,
    ),
    Route(
        "POST", "/v2/repository/index", f"{_INFERENCE}RepositoryIndex", "List the models",
        inference.RepositoryIndexRequest, inference.RepositoryIndexResponse, Body.MESSAGE, Answer.INDEX,
    ),
)  # fmt: skip

#: Other paths of Triton, and the methods that refuse them with a reason. They take GET and POST.
REFUSED: Sequence[tuple[str, str]] = (
    *(
        (f"/v2/{kind.lower()}sharedmemory{region}/{act.lower()}", f"{_INFERENCE}{kind}SharedMemory{act}")
        for kind in ("System", "Cuda")
        for act in ("Status", "Register", "Unregister")
        for region in ("", "/region/{region}")
    ),
    ("/v2/trace/setting", f"{_INFERENCE}TraceSetting"),
    ("/v2/models/{name}/trace/setting", f"{_INFERENCE}TraceSetting"),
    ("/v2/logging", f"{_INFERENCE}LogSettings"),
    ("/v2/repository/models/{name}/load", f"{_INFERENCE}RepositoryModelLoad"),
    ("/v2/repository/models/{name}/unload", f"{_INFERENCE}RepositoryModelUnload"),
)
