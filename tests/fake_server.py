"""A small gRPC server that a test scripts, for faults that a real server shows only in trouble."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.client.channel import SERVICE

# A call's first step: nothing, or an end with a status and trailing metadata.
Step = tuple[grpc.StatusCode, Sequence[tuple[str, str | bytes]]] | None


def numbered(number: int) -> NDArray[np.uint8]:
    """Return an image (2, 2) that a fake server answers with this number, up to 65535, as its pose."""
    return np.frombuffer(number.to_bytes(4), np.uint8).reshape(2, 2)


def answer(request: pb.ClassifyRequest, version: str = "1") -> pb.ClassifyResponse:
    response = pb.ClassifyResponse(model_name="fake", model_version=version)
    for image in request.images:
        pose = [float(int.from_bytes(image.pixels)), 0.0]
        capsules = [pb.ClassCapsule(label="a", probability=0.75, pose=pose), pb.ClassCapsule(label="b", pose=[0, 0])]
        response.results.add(label="a", class_index=0, capsules=capsules)
    return response


class FakeServer:
    """A fake server. ``steps`` scripts Classify, call by call; ``stream`` answers ClassifyStream."""

    def __init__(self, *, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None) -> None:
        self.steps: list[Step] = []
        self.stream: Callable[[Iterator[pb.ClassifyStreamRequest], Any], Iterator[pb.ClassifyStreamResponse]] = (
            lambda requests, context: (
                pb.ClassifyStreamResponse(id=one.id, response=answer(one.request)) for one in requests
            )
        )
        #: The answers of Explain and Reconstruct. None: of a server that is older than the method.
        self.explain: Callable[[pb.ExplainRequest], pb.ExplainResponse] | None = None
        self.reconstruct: Callable[[pb.ReconstructRequest], pb.ReconstructResponse] | None = None
        self.called_at: list[float] = []
        self.shape = (1, 2, 2)
        self.version = "1"
        self.models_asked = 0
        self.metadata: dict[str, str | bytes] = {}
        self.stopping = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", -1)])
        self._server.add_generic_rpc_handlers((self._handler(),))
        port = (
            self._server.add_secure_port(address, credentials)
            if credentials
            else self._server.add_insecure_port(address)
        )
        self.address = address if address.startswith("unix:") else f"127.0.0.1:{port}"
        self._server.start()

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.stop(0).wait()

    def _handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Classify": grpc.unary_unary_rpc_method_handler(
                    self._classify, pb.ClassifyRequest.FromString, pb.ClassifyResponse.SerializeToString
                ),
                "GetModel": grpc.unary_unary_rpc_method_handler(
                    self._get_model, pb.GetModelRequest.FromString, pb.GetModelResponse.SerializeToString
                ),
                "Explain": grpc.unary_unary_rpc_method_handler(
                    lambda request, context: self._answer(self.explain, request, context),
                    pb.ExplainRequest.FromString,
                    pb.ExplainResponse.SerializeToString,
                ),
                "Reconstruct": grpc.unary_unary_rpc_method_handler(
                    lambda request, context: self._answer(self.reconstruct, request, context),
                    pb.ReconstructRequest.FromString,
                    pb.ReconstructResponse.SerializeToString,
                ),
                "ClassifyStream": grpc.stream_stream_rpc_method_handler(
                    self._classify_stream,
                    pb.ClassifyStreamRequest.FromString,
                    pb.ClassifyStreamResponse.SerializeToString,
                ),
            },
        )

    def _classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        self.called_at.append(time.monotonic())
        self.metadata = dict(context.invocation_metadata())
        if self.steps and (step := self.steps.pop(0)):
            end(context, *step)
        return answer(request, self.version)

    def _get_model(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        self.models_asked += 1
        channels, height, width = self.shape
        return pb.GetModelResponse(
            model_name="fake",
            model_version=self.version,
            labels=["a", "b"],
            image_channels=channels,
            image_height=height,
            image_width=width,
            pose_size=2,
            max_images_per_request=1024,
            max_request_bytes=2**22,
        )

    def _answer(self, method: Callable[[Any], Any] | None, request: Any, context: Any) -> Any:
        self.called_at.append(time.monotonic())
        self.metadata = dict(context.invocation_metadata())
        if self.steps and (step := self.steps.pop(0)):
            end(context, *step)
        if method is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        else:
            return method(request)

    def _classify_stream(
        self, requests: Iterator[pb.ClassifyStreamRequest], context: Any
    ) -> Iterator[pb.ClassifyStreamResponse]:
        self.called_at.append(time.monotonic())
        self.metadata = dict(context.invocation_metadata())
        return self.stream(requests, context)


def end(context: Any, code: grpc.StatusCode, metadata: Sequence[tuple[str, str | bytes]] = ()) -> None:
    """End a call with this status."""
    context.set_trailing_metadata(tuple(metadata))
    context.abort(code, "told to")
