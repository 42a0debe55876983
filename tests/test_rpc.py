"""Tests of the door: calls are refused by their headers alone, and counted and logged."""

import asyncio
import logging
from collections.abc import Callable, Hashable

import grpc
import pytest

from serving.errors import DeadlineUnmeetable, QueueFull, ServingError
from serving.logs import FIELDS
from serving.metrics.registry import Metrics, ModelMetrics
from serving.metrics.triton_statistics import REJECTED
from serving.rpc.edge import Call, Edge
from serving.transport.headers import status_block
from serving.transport.methods import Peer

FULL = QueueFull("full", 0.07)


class Setting:
    """A method with ``refused``, the error with which its calls are refused."""

    def __init__(self, refused: Callable[[float | None, int], ServingError | None]) -> None:
        self.metrics = Metrics()
        self.model = ModelMetrics(self.metrics, "m", "1", ["0"])
        self.asked: list[tuple[float | None, int]] = []
        self._refused = refused
        door = Edge(self.metrics).unary_at_once("s", "m", self.begin, self.refusal).door
        assert door
        self._door = door

    def begin(self, data: bytes, call: Call) -> None:
        call.succeed(data)

    def door(self, timeout: float | None, expected: int, request_id: str = "") -> bytes | None:
        metadata = (("x-request-id", request_id),) if request_id else ()
        status = self._door(timeout, metadata, expected, Peer("127.0.0.1"))
        return status.block if status else None

    def refusal(
        self, timeout: float | None, expected: int, client: Hashable
    ) -> tuple[ServingError, ModelMetrics] | None:
        self.asked.append((timeout, expected))
        error = self._refused(timeout, expected)
        return (error, self.model) if error else None

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


async def _turn() -> None:
    await asyncio.sleep(0)


def test_what_is_refused_in_one_turn_is_logged_and_counted_one_by_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)

    async def test() -> None:
        setting = Setting(lambda timeout, expected: FULL)
        blocks = [setting.door(1.0, 0, name) for name in "abc"] + [setting.door(2.0, 0, "d")]
        details = FULL.code, "full"
        assert len(set(blocks)) == 1 and blocks[0] is not None
        assert blocks[0].startswith(status_block(*details)) and b"grpc-retry-pushback-ms" in blocks[0]
        assert setting.asked == [(1.0, 0)] * 3 + [(2.0, 0)]
        await _turn()
        of_method = {"grpc_type": "unary", "grpc_service": "s", "grpc_method": "m"}
        assert setting.value("grpc_server_started_total", **of_method) == 4
        assert setting.value("grpc_server_handled_total", **of_method, grpc_code="RESOURCE_EXHAUSTED") == 4
        assert setting.value("grpc_server_handling_seconds_count", **of_method) == 4
        assert setting.value("capsnet_refused_total", reason="queue_full") == 4
        assert setting.model.statistics.failures[REJECTED] == setting.model.statistics.fail.count == 4
        assert [getattr(record, FIELDS)["request_id"] for record in caplog.records] == [*"abcd"]

        setting.door(1.0, 0)
        assert setting.asked[4:] == [(1.0, 0)]

    asyncio.run(test())


def test_what_is_expected_before_a_call_decides_whether_it_is_refused() -> None:
    async def test() -> None:
        setting = Setting(lambda timeout, expected: FULL if expected >= 3 else None)
        # Headers of many calls may come before the message of the first.
        assert [setting.door(None, expected) is None for expected in range(5)] == [True] * 3 + [False] * 2
        assert setting.door(None, 2) is None, "one of them was wrong, and is not queued"
        assert setting.door(None, 0) is None, "the calls of another client"
        assert setting.door(None, 7) is not None
        assert [expected for _, expected in setting.asked] == [0, 1, 2, 3, 4, 2, 0, 7]
        await _turn()
        assert setting.value("capsnet_refused_total", reason="queue_full") == 3

    asyncio.run(test())


def test_each_call_is_counted_with_the_error_that_it_was_refused_with() -> None:
    late = DeadlineUnmeetable("late")

    async def test() -> None:
        setting = Setting(lambda timeout, expected: late if expected else FULL)
        assert setting.door(None, 1) == setting.door(None, 1) == status_block(late.code, "late")
        assert setting.door(None, 0) == setting.door(None, 0) != status_block(late.code, "late")
        await _turn()
        assert setting.value("capsnet_refused_total", reason="deadline") == 2
        assert setting.value("capsnet_refused_total", reason="queue_full") == 2
        of_method = {"grpc_type": "unary", "grpc_service": "s", "grpc_method": "m"}
        assert setting.value("grpc_server_handled_total", **of_method, grpc_code="DEADLINE_EXCEEDED") == 2
        assert setting.value("grpc_server_started_total", **of_method) == 4

    asyncio.run(test())


def test_the_status_of_a_refusal_is_the_errors() -> None:
    async def test() -> None:
        setting = Setting(lambda timeout, expected: ServingError("broken"))
        block = setting.door(None, 0)
        assert block == status_block(grpc.StatusCode.INTERNAL, "broken")
        await _turn()
        assert setting.value("capsnet_refused_total", reason="internal") == 1

    asyncio.run(test())
