"""Tests of the figures of both transports, which the metrics show."""

import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from serving.metrics.registry import Metrics
from serving.transport import frames
from serving.transport.counts import EVICTIONS, MEMORY, STALLED
from serving.transport.frames import ErrorCode
from tests.raw_client import Raw, framed, headers, wait_for
from tests.transport_methods import BYTES_UNDER_WAY, Serving, serve

Page = Callable[[str], dict[str, float]]


@pytest.fixture
def shown() -> tuple[Metrics, Page]:
    """Metrics, and a function that returns the values of a metric's samples by its labels other than the port."""
    metrics = Metrics()

    def read(name: str) -> dict[str, float]:
        samples = [sample for family in metrics.registry.collect() for sample in family.samples if sample.name == name]
        return {",".join(v for k, v in sample.labels.items() if k != "port"): sample.value for sample in samples}

    return metrics, read


def test_connections_calls_resets_and_goaways_are_counted(shown: tuple[Metrics, Page]) -> None:
    metrics, page = shown
    with serve() as serving:
        metrics.show_transport(serving.server.figures, "grpc")
        assert page("capsnet_goaways_total") == {code.name: 0 for code in ErrorCode}
        first, second = Raw(serving.port), Raw(serving.port)
        first.call(1, b"30", "/test.Test/Wait")
        first.call(3, b"30", "/test.Test/Wait")
        wait_for(lambda: page("capsnet_open_calls") == {"": 2})
        assert page("capsnet_connections") == {"": 2} == page("capsnet_connections_accepted_total")
        first.send(frames.reset(1, ErrorCode.CANCEL))
        wait_for(lambda: page("capsnet_open_calls") == {"": 1})
        assert page("capsnet_stream_resets_total") == {"received": 1, "sent": 0}
        first.send(headers(5, first.block()) + frames.frame(frames.WINDOW_UPDATE, 0, 5, bytes(4)))
        assert first.read(5).reset == ErrorCode.PROTOCOL_ERROR
        assert page("capsnet_stream_resets_total") == {"received": 1, "sent": 1}
        second.send(frames.frame(frames.DATA, 0, 7, b"x"))
        assert second.why_closed() is ErrorCode.PROTOCOL_ERROR
        wait_for(lambda: page("capsnet_connections") == {"": 1})
        serving.drain(10)
        first.send(frames.frame(frames.PING, frames.ACK, 0, b"drain\0\0\0"))
        first.read_until(lambda: len(first.went_away) == 2)
        found = {code: count for code, count in page("capsnet_goaways_total").items() if count}
        assert found == {"PROTOCOL_ERROR": 1, "NO_ERROR": 1}
        for client in (first, second):
            client.socket.close()
        wait_for(lambda: page("capsnet_connections") == {"": 0} == page("capsnet_open_calls"))
        assert page("capsnet_connections_accepted_total") == {"": 2}


def test_the_held_bytes_and_the_calls_that_are_refused_for_them_are_counted(
    transport: str, shown: tuple[Metrics, Page]
) -> None:
    metrics, page = shown
    with serve(transport) as serving, serving.channel as channel:
        metrics.show_transport(serving.server.figures, "grpc")
        assert page("capsnet_held_limit_bytes") == {"": BYTES_UNDER_WAY}
        assert page("capsnet_held_bytes") == {"": 0} == page("capsnet_open_calls")
        assert page("capsnet_evicted_calls_total") == dict.fromkeys(EVICTIONS, 0)
        request = b"30".ljust(2**20 - 100)
        wait: Any = channel.unary_unary("/test.Test/Wait")
        held = [wait.future(request, timeout=60) for _ in range(3)]
        wait_for(lambda: page("capsnet_open_calls") == {"": 3} and page("capsnet_held_bytes")[""] >= 3 * len(request))
        held += [wait.future(request, timeout=60) for _ in range(2)]

        def all_told() -> bool:
            ended = sum(call.done() for call in held)
            return ended > 0 and page("capsnet_evicted_calls_total") == {MEMORY: ended, STALLED: 0}

        wait_for(all_told)
        assert {call.code() for call in held if call.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        for call in held:
            call.cancel()
        wait_for(lambda: page("capsnet_held_bytes") == {"": 0} == page("capsnet_open_calls"))


def test_a_call_that_makes_no_progress_is_counted_and_told(shown: tuple[Metrics, Page]) -> None:
    metrics, page = shown
    told: list[str] = []
    with serve(stall_seconds=0.2, limits={"dropped": lambda text, _: told.append(text)}) as serving:
        metrics.show_transport(serving.server.figures, "grpc")
        client = Raw(serving.port)
        for stream, path in ((1, "/test.Test/Echo"), (3, "/test.Test/EchoAll")):
            client.send(headers(stream, client.block(path)))
            client.send_data(stream, framed(b"abc")[:6], last=False)
            assert client.read(stream).headers["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert page("capsnet_evicted_calls_total") == {MEMORY: 0, STALLED: 2}
        text = "the request has not come further for 0.2 seconds"
        assert serving.refused == [("/test.Test/Echo", grpc.StatusCode.RESOURCE_EXHAUSTED, text)]
        assert told == [f"a call is ended: {text}"]
        client.socket.close()


@pytest.mark.parametrize("path", ["/test.Test/Echo", "/test.Test/EchoAll"])
@pytest.mark.parametrize(("size", "rows"), [(95, 1), (5000, 4)])
def test_an_answer_that_waits_for_its_client_is_told_and_so_is_its_end(path: str, size: int, rows: int) -> None:
    told: list[tuple[str, int]] = []
    with serve(limits={"unread": lambda client, more: told.append((client, more))}) as serving:
        client = Raw(serving.port, settings={frames.INITIAL_WINDOW_SIZE: 30})
        client.call(1, b"x" * size, path)
        client.read_until(lambda: len(client.answers[1].data) == 30)
        wait_for(lambda: [more for _, more in told] == [rows])
        client.send(frames.window_update(1, 10))
        client.read_until(lambda: len(client.answers[1].data) == 40)
        client.send(frames.window_update(1, 10_000))
        assert client.read(1).messages == [b"x" * size]
        assert [more for _, more in told] == [rows, -rows]
        assert len({name for name, _ in told}) == 1
        client.socket.close()


def test_each_answer_of_a_stream_that_waits_for_its_client_is_told() -> None:
    told: list[int] = []
    with serve(limits={"unread": lambda _, more: told.append(more)}) as serving:
        client = Raw(serving.port, settings={frames.INITIAL_WINDOW_SIZE: 0})
        client.send(headers(1, client.block("/test.Test/EchoAll")))
        client.send_data(1, framed(b"x") * 100)
        wait_for(lambda: told == [1] * 100)
        client.send(frames.window_update(1, 1000))
        assert client.read(1).messages == [b"x"] * 100
        assert told == [1] * 100 + [-100]
        client.socket.close()


def test_grpcs_own_server_shows_no_figures_that_it_cannot_tell(shown: tuple[Metrics, Page]) -> None:
    metrics, page = shown
    with serve("grpcio") as serving:
        metrics.show_transport(serving.server.figures, "grpc")
        names = ("connections", "connections_accepted_total", "stream_resets_total", "goaways_total")
        assert [page(f"capsnet_{name}") for name in names] == [{}] * 4


def test_the_page_may_be_read_while_connections_come_and_go(shown: tuple[Metrics, Page]) -> None:
    metrics, page = shown

    def come_and_go(serving: Serving) -> None:
        for _ in range(50):
            client = Raw(serving.port)
            client.call(1, b"a")
            assert client.read(1).messages == [b"a"]
            client.socket.close()

    with serve() as serving:
        metrics.show_transport(serving.server.figures, "grpc")
        threads = [threading.Thread(target=come_and_go, args=(serving,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            page("capsnet_open_calls")
        for thread in threads:
            thread.join()
        assert page("capsnet_connections_accepted_total") == {"": 100}
