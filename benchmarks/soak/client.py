"""A client of a soak: connections to one server, and the right answers that it compares with."""

import asyncio
import contextlib
import random
import ssl
from collections.abc import Mapping, Sequence

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks.soak.inner_text import inner_text
from benchmarks.soak.right_answers import Numbers, Version, as_png, difference
from benchmarks.soak.served import SWAPPED, Soaked
from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.capsnet.v1.capsnet_pb2_grpc import CapsNetServiceStub
from protos.inference import inference_pb2 as inference
from protos.inference.inference_pb2_grpc import GRPCInferenceServiceStub

#: The deadline of calls that must be answered, in seconds: far above what a busy machine takes.
PATIENCE_SECONDS = 30.0
MAX_IMAGES = 12
Metadata = tuple[tuple[str, str], ...]


class WrongAnswer(Exception):
    """An answer is wrong. The text says how."""


class Client:
    """A client with one connection for the whole soak, and new ones when a call asks for them.

    present: the models that may answer now; calls of others may also get NOT_FOUND.
    """

    def __init__(self, server: Soaked, images: NDArray[np.uint8], answers: Mapping[Version, Numbers]) -> None:
        self.server = server
        self.random = random.Random(0)
        self.metadata = bearer(server.token_of["predict"])
        self.present = {name for name, _ in answers}
        self._images, self._answers = images, answers
        self._png = [as_png(image) for image in images]
        self.channel = self.connect()
        self.capsnet = CapsNetServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self.inference = GRPCInferenceServiceStub(self.channel)  # type: ignore[no-untyped-call]

    def connect(self, address: str = "") -> grpc.aio.Channel:
        """Return a channel with a connection of its own, encrypted but on a Unix socket."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        if address.startswith("unix:"):
            return grpc.aio.insecure_channel(address, options)
        credentials = grpc.ssl_channel_credentials(self.server.certificate)
        return grpc.aio.secure_channel(address or self.server.address, credentials, options)

    def tls(self, protocol: str) -> ssl.SSLContext:
        """Return a context for connections without gRPC. protocol: the name for ALPN."""
        context = ssl.create_default_context(cadata=self.server.certificate.decode())
        context.set_alpn_protocols([protocol])
        return context

    async def abort(self, writer: asyncio.StreamWriter) -> None:
        """Send what is written, and break the connection off a moment later."""
        with contextlib.suppress(OSError):  # the server may have hung up first
            await writer.drain()
            await asyncio.sleep(self.random.uniform(0, 0.05))
            writer.transport.abort()
            await writer.wait_closed()

    def places(self, most: int = MAX_IMAGES) -> list[int]:
        """Return the numbers of some digits, drawn by lot."""
        return [self.random.randrange(len(self._images)) for _ in range(self.random.randint(1, most))]

    def classify_request(self, places: Sequence[int], name: str = SWAPPED) -> pb.ClassifyRequest:
        """Return a request with these digits, each as pixels or as a PNG."""
        images = [
            pb.Image(encoded=self._png[place]) if self.random.random() < 0.2
            else pb.Image(pixels=self._images[place].tobytes())
            for place in places
        ]  # fmt: skip
        return pb.ClassifyRequest(model_name=name, images=images)

    def infer_request(self, places: Sequence[int], name: str = SWAPPED) -> inference.ModelInferRequest:
        """Return a request with these digits."""
        shape = (len(places), 1, *self._images.shape[1:])
        tensor = inference.ModelInferRequest.InferInputTensor(name="images", datatype="UINT8", shape=shape)
        pixels = self._images[list(places)].tobytes()
        return inference.ModelInferRequest(model_name=name, inputs=[tensor], raw_input_contents=[pixels])

    def check_classified(self, answer: pb.ClassifyResponse, places: Sequence[int]) -> None:
        """Raise WrongAnswer unless an answer is the right one of its version."""
        expected = self._expected(answer.model_name, answer.model_version)
        capsules = [one.capsules for one in answer.results]
        probabilities = np.array([[one.probability for one in several] for several in capsules], np.float32)
        poses = np.array([[one.pose for one in several] for several in capsules], np.float32)
        if wrong := difference(expected, places, probabilities, poses):
            raise WrongAnswer(f"Classify: {wrong}")
        right = expected.probabilities[list(places)].argmax(1)
        if [one.class_index for one in answer.results] != right.tolist():
            raise WrongAnswer("Classify: another class")
        if [one.label for one in answer.results] != [expected.labels[index] for index in right]:
            raise WrongAnswer("Classify: another label")

    def check_inferred(self, answer: inference.ModelInferResponse, places: Sequence[int]) -> None:
        """Raise WrongAnswer unless an answer is the right one of its version."""
        expected = self._expected(answer.model_name, answer.model_version)
        found = {
            output.name: np.frombuffer(raw, np.float32).reshape(tuple(output.shape))
            for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }
        if wrong := difference(expected, places, found["probabilities"], found["poses"]):
            raise WrongAnswer(f"ModelInfer: {wrong}")

    def _expected(self, name: str, version: str) -> Numbers:
        try:
            return self._answers[Version(name, version)]
        except KeyError:
            raise WrongAnswer(f"an answer of {name!r} version {version!r}") from None


def check_text(error: grpc.aio.AioRpcError) -> None:
    """Raise WrongAnswer if the text of an error tells about the inside of the server."""
    if sign := inner_text(error.details() or ""):
        raise WrongAnswer(f"inner text in an error: {sign!r} in {error.details()!r}")


def bearer(token: str) -> Metadata:
    """Return the metadata with a token."""
    return (("authorization", f"Bearer {token}"),)


async def connection_losses(channel: grpc.aio.Channel) -> list[str]:
    """Wait until a connection that was open is lost. Return the state that followed."""
    state = channel.get_state(try_to_connect=True)
    while state is not grpc.ChannelConnectivity.READY:
        await channel.wait_for_state_change(state)
        state = channel.get_state()
    await channel.wait_for_state_change(state)
    await asyncio.sleep(0)
    return [str(channel.get_state())]
