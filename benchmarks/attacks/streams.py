"""Attacks by streams, whose requests wait for room: costly to compute, with large answers, or with nobody to read."""

import socket
from functools import partial

from grpc_reflection.v1alpha import reflection_pb2

from benchmarks.attacks.link import (
    CLASSIFY_STREAM,
    INK,
    REFLECTION,
    SIDE,
    STREAM_INFER,
    Attack,
    Link,
    Pieces,
    data,
    framed,
    headers,
    uploads,
)
from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.inference import inference_pb2 as pb_oip
from serving.settings import Settings
from serving.transport import frames

_IMAGES = 256
_REQUESTS_OF_ONE_IMAGE = 200
_REQUESTS_OF_EXPLAINED_IMAGES = 8
_CONNECTIONS = 250
_SMALL_BUFFER_BYTES = 4096
_QUESTIONS_A_PIECE, _PIECES = 200, 40
_BYTES_BEHIND = 16_000


def _infer(output: str, images: int) -> bytes:
    """Return a request of the Open Inference Protocol for one output."""
    asked = pb_oip.ModelInferRequest(
        model_name="capsnet-mnist",
        inputs=[
            pb_oip.ModelInferRequest.InferInputTensor(name="images", datatype="UINT8", shape=[images, 1, SIDE, SIDE])
        ],
        outputs=[pb_oip.ModelInferRequest.InferRequestedOutputTensor(name=output)],
        raw_input_contents=[INK * images],
    )
    return framed(asked.SerializeToString())


def _relevance() -> bytes:
    """Return requests that make the server compute two hundred images for each one that came."""
    return _infer("relevance", 1) * _REQUESTS_OF_ONE_IMAGE


def _couplings() -> bytes:
    """Return requests whose answers are more than a hundred times as large."""
    return _infer("couplings", Settings.max_explained_images) * _REQUESTS_OF_EXPLAINED_IMAGES


def _reconstruction_errors() -> bytes:
    asked = pb.ClassifyRequest(images=[pb.Image(pixels=INK)] * _IMAGES, reconstruction_error=True)
    return framed(pb.ClassifyStreamRequest(id="1", request=asked).SerializeToString())


def _behind_answers(link: Link) -> Pieces:
    """Ask for files, read none, and send as much more as the server takes."""
    yield from link.ready()
    link.reads = False
    link.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER_BYTES)
    asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService")
    questions = framed(asked.SerializeToString()) * _QUESTIONS_A_PIECE
    stream = link.next_stream()
    yield headers(stream, REFLECTION)
    for _ in range(_PIECES):
        yield data(stream, questions, False)
    yield frames.frame(0x2A, 0, 0, bytes(_BYTES_BEHIND)) * _PIECES  # of a kind that nobody knows


STREAMS = (
    Attack("relevance in streams", partial(uploads, path=STREAM_INFER, make=_relevance)),
    Attack(
        "couplings in streams, not read",
        partial(uploads, path=STREAM_INFER, make=_couplings),
        settings={frames.INITIAL_WINDOW_SIZE: 0},
    ),
    Attack("reconstruction errors in streams", partial(uploads, path=CLASSIFY_STREAM, make=_reconstruction_errors)),
    Attack("frames behind unread answers", _behind_answers, times=_CONNECTIONS),
)
