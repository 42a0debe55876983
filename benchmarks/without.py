"""``python -m benchmarks.without TRICKS FLAGS...``: the server with tricks of its request path switched off.

Each trick is undone from outside, so the server itself has no setting for it. If the server's code no longer has the
replaced part, the command ends: then check the trick, or its entry here.
"""

import asyncio
import gc
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import prometheus_client
import uvloop

import serving.__main__ as program
from protos.capsnet.v1 import capsnet_pb2 as pb
from serving import server
from serving.artifact import Artifact
from serving.batching import admission, batch, slots
from serving.batching.ticket import Share
from serving.metrics import registry
from serving.metrics.instruments import Observations
from serving.repository.classifier import POSES, PROBABILITIES
from serving.rpc import door, edge, recorder
from serving.rpc.status import status_of
from serving.services import capsnet_codec
from serving.transport import call, connection, headers
from serving.transport.methods import CallbackMethod, Context, UnaryMethod

#: Loads by name: single images with 16 and 64 in flight, 64 images a request, streams, calls that are all refused for
#: their deadline, and an overload, in which two of three calls are refused.
FEW, MANY, LARGE, STREAMS = "16 in flight", "64 in flight", "64 images each", "4 streams"
REFUSALS, OVERLOAD = "refusals", "overload"
LOADS = (FEW, MANY, LARGE, STREAMS, REFUSALS, OVERLOAD)
_USUAL = (FEW, MANY, REFUSALS, OVERLOAD)
_REFUSED = (REFUSALS, OVERLOAD)


@dataclass(frozen=True)
class Trick:
    """Code of the server for speed alone: a function that undoes it, and the loads that it may speed up."""

    undo: Callable[[], None]
    loads: tuple[str, ...] = _USUAL


def _replace(owner: Any, **values: object) -> None:
    """Replace attributes of a module or a class. Raises AttributeError for one that it lacks."""
    for name, value in values.items():
        getattr(owner, name)
        setattr(owner, name, value)


def _no_refusals_kept() -> None:
    _replace(admission, lru_cache=lambda _: lambda function: function)
    _replace(door.MethodDoor, _status=lambda _, error: status_of(error))


def _a_task_for_each_call() -> None:
    class Awaited(edge.Call):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.ended = asyncio.get_running_loop().create_future()

        def end(self, *code: Any) -> None:
            super().end(*code)
            if not self.ended.done():
                self.ended.set_result(None)

    def unary(self: Any, service: str, method: str, begin: Callable[..., None], refusal: Any) -> UnaryMethod:
        record = recorder.Recorder(self._metrics, "unary", service, method)

        async def handle(data: bytes, context: Context) -> None:
            under_way = Awaited(self, record, context)
            try:
                begin(data, under_way)
            except Exception as error:
                under_way.fail(error)
            else:
                await under_way.ended

        return UnaryMethod(handle, door.MethodDoor(self, record, refusal))

    _replace(edge.Edge, unary_at_once=unary)


class _Count:
    """A count kept by prometheus_client's instrument."""

    def __init__(self) -> None:
        self._counter = prometheus_client.Counter("counter", "for a benchmark", registry=None)

    def inc(self, times: int = 1) -> None:
        self._counter.inc(times)

    @property
    def value(self) -> int:
        return int(next(iter(self._counter.collect())).samples[0].value)


class _Observations:
    """Observes by prometheus_client's instrument."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._histogram = prometheus_client.Histogram("histogram", "for a benchmark", buckets=bounds, registry=None)

    def observe(self, value: float, times: int = 1) -> None:
        for _ in range(times):
            self._histogram.observe(value)

    @property
    def value(self) -> Observations:
        shown = Observations(self._bounds)
        shown.sum = self._histogram._sum.get()
        shown.counts = [int(bucket.get()) for bucket in self._histogram._buckets]
        return shown


class _ProtobufWriter:
    """Writes answers by protobuf's classes."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact

    def __call__(self, share: Share) -> bytes:
        artifact, labels = self._artifact, self._artifact.labels
        response = pb.ClassifyResponse(model_name=artifact.name, model_version=artifact.version)
        for probabilities, poses in zip(share[PROBABILITIES], share[POSES], strict=True):
            winner = int(probabilities.argmax())
            one = response.results.add(label=labels[winner], class_index=winner)
            for label, probability, pose in zip(labels, probabilities.tolist(), poses.tolist(), strict=True):
                one.capsules.add(label=label, probability=probability, pose=pose)
        return response.SerializeToString()


def _write_at_once() -> None:
    def send(self: Any, data: bytes) -> None:
        self._out.append(data)
        self._flush()

    def send_all(self: Any, buffers: Iterable[bytes]) -> None:
        self._out += buffers
        self._flush()

    _replace(connection.Connection, send=send, send_all=send_all)


_STREAMED_TOO = (*_USUAL, STREAMS)
#: Tricks by name; the first, which is none, shows the noise.
TRICKS = {
    "nothing": Trick(lambda: None, LOADS),
    "door": Trick(partial(_replace, edge, CallbackMethod=lambda begin, _: CallbackMethod(begin)), (MANY, *_REFUSED)),
    "refusals kept": Trick(_no_refusals_kept, _REFUSED),
    "callbacks instead of tasks": Trick(_a_task_for_each_call),
    "headers remembered": Trick(partial(_replace, headers, _MAX_KNOWN_BYTES=-1)),
    "own counters": Trick(partial(_replace, registry, Count=_Count, Observations=_Observations), _STREAMED_TOO),
    "pixels without protobuf": Trick(
        partial(_replace, capsnet_codec.PixelReader, read=lambda *_: None, read_of_stream=lambda *_: None),
        (FEW, MANY, LARGE, STREAMS),
    ),
    "answer template": Trick(
        partial(_replace, capsnet_codec, AnswerWriter=_ProtobufWriter), (FEW, MANY, LARGE, STREAMS)
    ),
    "frames of an answer joined": Trick(partial(_replace, call, only_answer=lambda *_: None)),
    "one write a turn": Trick(_write_at_once, _STREAMED_TOO),
    "batches joined with the lock": Trick(partial(_replace, batch, _MAX_JOINED_WITH_LOCK_BYTES=-1)),
    "garbage seldom": Trick(partial(_replace, server, _GARBAGE_THRESHOLD=gc.get_threshold()[0])),
    "switch interval": Trick(partial(_replace, program, _SWITCH_SECONDS=sys.getswitchinterval())),
    "thread priority": Trick(partial(_replace, slots, _ADDED_NICENESS=0)),
    "uvloop": Trick(partial(_replace, uvloop, new_event_loop=asyncio.new_event_loop), (*_STREAMED_TOO, LARGE)),
}


def main(arguments: Sequence[str]) -> int:
    """Serve without the tricks that the first argument names, divided by commas, with the flags that follow."""
    names, *flags = arguments
    for name in names.split(","):
        TRICKS[name].undo()
    sys.argv = ["serving", *flags]
    return program.main()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
