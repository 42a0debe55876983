"""A client in good faith: it sends real digits at a steady rate, and checks each answer."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.attacks.link import CLASSIFY
from benchmarks.attacks.served import Target
from benchmarks.load import LoadError
from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.files.idx import read_idx

CALLS_A_SECOND = 40
_DIGITS = 16
#: Every so many calls, one comes over a new connection.
_CALLS_A_CONNECTION = 40
#: Largest difference of a probability or a pose's component from the quiet answer: batches differ in rounding.
_TOLERANCE = 1e-4
_DATA = Path(__file__).parents[2] / "tests" / "data"


@dataclass
class Calls:
    """The results of a client's calls.

    made: their number. right: those with the right answer. wrong: those with a wrong one. latencies_ms: the times of
    the right ones that did not open a connection. failed: the codes of the others.
    """

    made: int = 0
    right: int = 0
    wrong: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """The share of calls with the right answer."""
        return self.right / self.made

    @property
    def p99_ms(self) -> float:
        """The 99th percentile of ``latencies_ms``; NaN if there are none."""
        return float(np.percentile(self.latencies_ms, 99)) if self.latencies_ms else float("nan")


class GoodClient:
    """A client with one connection, and now and then a new one.

    deadline: the time after which a call is given up, in seconds. The right answers are those of the quiet server,
    whose labels must be those of the data set. Raises LoadError if they are not, or do not come.
    """

    def __init__(self, server: Target, deadline: float) -> None:
        self._server, self._deadline = server, deadline
        self._channel = server.channel()
        self._metadata = (("authorization", f"Bearer {server.token}"),) if server.token else ()
        images = read_idx((_DATA / "t10k-images-idx3-ubyte.gz").read_bytes())[:_DIGITS]
        labels = read_idx((_DATA / "t10k-labels-idx1-ubyte.gz").read_bytes())[:_DIGITS]
        self._requests = [pb.ClassifyRequest(images=[pb.Image(pixels=image.tobytes())]) for image in images]
        self._expected: list[pb.ClassifyResponse] = []
        for request, label in zip(self._requests, labels, strict=True):
            try:
                answer = self._method(self._channel)(request, timeout=30, metadata=self._metadata)
            except grpc.RpcError as error:
                raise LoadError(f"the quiet server did not answer: {error}") from error
            if answer.results[0].class_index != label:
                raise LoadError(f"the quiet server took a {label} for a {answer.results[0].label}")
            self._expected.append(answer)

    def close(self) -> None:
        self._channel.close()

    def calls(self, seconds: float) -> Calls:
        """Make calls at a steady rate, without waiting for answers. Return once all have ended."""
        total = max(1, round(seconds * CALLS_A_SECOND))
        result, ended = Calls(), threading.Semaphore(0)
        lock = threading.Lock()
        begin = time.perf_counter()
        for number in range(total):
            due = begin + number / CALLS_A_SECOND
            time.sleep(max(0.0, due - time.perf_counter()))
            fresh = number % _CALLS_A_CONNECTION == _CALLS_A_CONNECTION // 2
            channel = self._server.channel() if fresh else self._channel
            call = self._method(channel).future(
                self._requests[number % _DIGITS], timeout=self._deadline, metadata=self._metadata
            )

            def end(call: Any, number: int = number, due: float = due, fresh: bool = fresh) -> None:
                latency = 1000 * (time.perf_counter() - due)
                with lock:
                    self._count(result, call, number, None if fresh else latency)
                ended.release()

            call.add_done_callback(end)
            if fresh:
                call.add_done_callback(lambda _, channel=channel: threading.Thread(target=channel.close).start())
        for _ in range(total):
            ended.acquire()
        return result

    def _count(self, result: Calls, call: Any, number: int, latency_ms: float | None) -> None:
        """Add a call that has ended to the results. latency_ms: None if it opened a connection."""
        result.made += 1
        if (code := call.code()) is not grpc.StatusCode.OK:
            result.failed[code.name] += 1
        elif not _equal(call.result(), self._expected[number % _DIGITS]):
            result.wrong += 1
        else:
            result.right += 1
            if latency_ms is not None:
                result.latencies_ms.append(latency_ms)

    @staticmethod
    def _method(channel: grpc.Channel) -> Any:
        return channel.unary_unary(CLASSIFY, pb.ClassifyRequest.SerializeToString, pb.ClassifyResponse.FromString)


def _equal(answer: pb.ClassifyResponse, expected: pb.ClassifyResponse) -> bool:
    """Return True if an answer has the expected label, and its numbers differ by rounding alone."""
    if [one.class_index for one in answer.results] != [one.class_index for one in expected.results]:
        return False
    return bool(np.abs(_numbers(answer) - _numbers(expected)).max() <= _TOLERANCE)


def _numbers(answer: pb.ClassifyResponse) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Return the probability and the pose of each class: (classes, 1 + pose size)."""
    return np.array([[capsule.probability, *capsule.pose] for capsule in answer.results[0].capsules])


@contextmanager
def good_client(server: Target, deadline: float) -> Iterator[GoodClient]:
    """A client in good faith, until the block ends. deadline: of each call, in seconds."""
    client = GoodClient(server, deadline)
    try:
        yield client
    finally:
        client.close()
