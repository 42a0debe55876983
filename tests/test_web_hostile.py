"""Tests of the HTTP port beside clients in bad faith: turns, memory, and texts that take long to read."""

import asyncio
import json
import random
import re
import socket
import struct
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import Message

from protos.capsnet.v1 import capsnet_pb2
from serving.transport.methods import Context, UnaryMethod
from serving.web import json_messages
from serving.web import server as server_module
from serving.web.connection import WebConnection
from serving.web.conversions import Conversions
from serving.web.forms import from_pictures
from serving.web.incoming import BodyLimits, Incoming
from serving.web.json_messages import read_json, write_json
from serving.web.json_requests import read_message
from serving.web.problems import Problem
from serving.web.tensors import read_infer
from tests.raw_client import wait_for
from tests.web_client import PATIENCE, Web, ask, serving

GET_MODEL = "/capsnet.v1.CapsNetService/GetModel"
#: More than the event loop converts itself, in bytes.
LARGE = 100_000
ASKED = b"GET /v1/model HTTP/1.1\r\nHost: localhost\r\n\r\n"


def describing(dataset: str = "") -> UnaryMethod:
    """Return a method that answers with a description of this length."""
    data: bytes = capsnet_pb2.GetModelResponse(dataset=dataset).SerializeToString()

    async def answer(_: bytes, context: Context) -> bytes:
        return data

    return UnaryMethod(answer)


@contextmanager
def connected(web: Web, receive_bytes: int = 0) -> Iterator[socket.socket]:
    with socket.socket() as client:
        client.settimeout(PATIENCE)
        if receive_bytes:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        client.connect(("127.0.0.1", web.port))
        yield client


@dataclass
class Pauses:
    """The times between the ticks of something that wants to run all the time, in seconds."""

    ticks: list[float] = field(default_factory=list)

    def tick(self) -> None:
        self.ticks.append(time.perf_counter())

    @property
    def longest_share(self) -> float:
        """Return the longest time between two ticks, as a share of all the time."""
        times = np.diff(self.ticks)
        return float(times.max() / times.sum())


def beside_a_thread(work: Callable[[], object]) -> float:
    """Return the longest pause of another thread beside some work, as a share of the work's time; of three tries."""

    def once() -> float:
        pauses, ended = Pauses(), threading.Event()

        def run() -> None:
            while not ended.is_set():
                pauses.tick()

        thread = threading.Thread(target=run)
        thread.start()
        wait_for(lambda: bool(pauses.ticks))
        pauses.ticks = pauses.ticks[-1:]
        try:
            work()
        finally:
            ended.set()
            thread.join()
        return pauses.longest_share

    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        return min(once() for _ in range(3))
    finally:
        sys.setswitchinterval(interval)


def traced_peak(work: Callable[[], object]) -> int:
    """Return the most memory that some work takes, in bytes."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def count_calls(work: Callable[[], object]) -> int:
    """Return the number of calls of Python's functions, and of steps of generators, in some work."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def refusal(text: bytes, kind: type[Message] = capsnet_pb2.ClassifyRequest) -> str:
    """Return the text with which a message in JSON is refused."""
    with pytest.raises(Problem) as refused:
        read_message(text, kind, 1024)
    return refused.value.detail


def test_an_origin_that_is_no_address_is_a_foreign_page(caplog: pytest.LogCaptureFixture) -> None:
    with serving({}) as web:
        for origin in ("http://[", "http://]", "//[::1", "null"):
            assert ask(web.port, "/v1/classify", b"", origin=origin).status == 403
    assert caplog.records == []


def test_requests_that_come_before_their_turn_wait_outside_the_server() -> None:
    """The parser would take any number of them: one more read with each answer."""
    with serving({GET_MODEL: describing()}) as web, connected(web) as client:
        client.setblocking(False)
        unsent, received, most = memoryview(ASKED * 150_000), 0, 0
        end = time.monotonic() + PATIENCE
        while received < 100_000 and time.monotonic() < end:
            with suppress(BlockingIOError):
                unsent = unsent[client.send(unsent[: 2**20]) :]
            with suppress(BlockingIOError):
                received += len(client.recv(65536))
            for connection in list(web.server._connections):
                most = max(most, len(connection._arrived) + len(connection.conn.trailing_data[0]))
        assert received >= 100_000
        assert most < 2**20


def test_tiny_chunks_of_one_client_do_not_hold_up_the_others() -> None:
    chunks = b"1\r\nx\r\n" * 30_000
    head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with serving({}) as web, connected(web) as client:
        client.sendall(head[:-2])
        wait_for(lambda: web.server.connections == 1)
        [connection] = web.server._connections

        async def parse() -> float:
            pauses = Pauses()
            connection.flow.resume_reading = lambda: None  # type: ignore[method-assign]  # nothing more comes
            connection.data_received(head[-2:] + chunks)
            pauses.tick()
            for _ in range(10_000):
                await asyncio.sleep(0)
                pauses.tick()
                if connection.transport.is_closing() or not connection._arrived:
                    break
            return len(pauses.ticks)

        assert asyncio.run_coroutine_threadsafe(parse(), web.loop).result(PATIENCE) > 60


def test_answers_that_nobody_reads_give_their_memory_to_others() -> None:
    size, limit = 6 * 2**20, 2**24
    with serving({GET_MODEL: describing("x" * size)}, max_bytes_under_way=limit) as web, ExitStack() as stack:
        memory = web.server._application._terms.memory
        for count in range(1, 5):
            client = stack.enter_context(connected(web, receive_bytes=4096))
            client.sendall(ASKED)
            wait_for(lambda count=count: web.server.accepted == count and memory.used >= min(count, 2) * size)
            time.sleep(0.05)
            assert memory.used <= limit
        answer = ask(web.port, "/v1/model")
        assert answer.status == 200 and len(answer.json["dataset"]) == size
        wait_for(lambda: web.server.connections <= 2)
    assert memory.used == 0


def test_the_conversions_of_a_client_with_many_wait_for_those_of_others() -> None:
    order: list[str] = []

    async def main() -> None:
        conversions, proceed = Conversions(), threading.Event()

        def convert(name: str) -> str:
            proceed.wait(PATIENCE)
            order.append(name)
            return name

        names = ["many 1", "many 2", "many 3", "few 1"]
        tasks = [
            asyncio.create_task(conversions.run(name.split()[0], lambda name=name: convert(name)))  # type: ignore[misc]
            for name in names
        ]
        given_up = asyncio.create_task(conversions.run("few", lambda: convert("never")))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.sleep(0)
        proceed.set()
        assert await asyncio.gather(*tasks) == names
        conversions.close()

    asyncio.run(main())
    assert order == ["many 1", "few 1", "many 2", "many 3"]


def test_the_conversions_of_a_client_wait_as_long_as_its_last_ones_took() -> None:
    """A message of few bytes may take long, such as one of many lists."""
    order: list[str] = []

    async def main() -> None:
        conversions = Conversions()

        def convert(client: str, seconds: float) -> None:
            order.append(client)
            end = time.thread_time() + seconds
            while time.thread_time() < end:
                pass

        clients = {"slow": 0.05, "quick": 0.001}
        tasks = [conversions.run(name, partial(convert, name, clients[name])) for name in clients for _ in range(6)]
        await asyncio.gather(*tasks)
        conversions.close()

    asyncio.run(main())
    assert order == ["slow", *["quick"] * 6, *["slow"] * 5]


def test_the_answer_of_a_client_that_has_gone_is_not_converted() -> None:
    proceed = threading.Event()
    with serving({GET_MODEL: describing("x" * LARGE)}) as web:
        application = web.server._application

        async def keep_busy() -> bool:
            return await application._conversions.run("other", partial(proceed.wait, PATIENCE))

        busy = asyncio.run_coroutine_threadsafe(keep_busy(), web.loop)
        with connected(web) as client:
            client.sendall(ASKED)
            wait_for(lambda: len(application._conversions._waiting) == 1)
        wait_for(lambda: application.under_way == 0)
        assert application._terms.memory.used == 0 and not busy.done()
        proceed.set()
        assert ask(web.port, "/v1/model").status == 200


def test_a_request_that_outlasts_the_stop_writes_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "_LAST_SECONDS", 0.05)
    proceed = threading.Event()
    with serving({GET_MODEL: describing("x" * LARGE)}) as web, connected(web) as client:
        application = web.server._application
        application._conversions._thread.submit(proceed.wait, PATIENCE)
        client.sendall(ASKED)
        wait_for(lambda: application._conversions._busy)
        asyncio.run_coroutine_threadsafe(web.server.stop(0.05), web.loop).result(PATIENCE)
        wait_for(lambda: application.under_way == 0)
        proceed.set()
    assert caplog.records == []


def made_up(chance: random.Random, depth: int = 0) -> Any:
    """Return a value of JSON."""
    kind = chance.random()
    if depth > 4 or kind < 0.3:
        return chance.choice([1, 2.5, None, True, 'a"]x', "é", -3, 1e10, ""])
    if kind < 0.7:
        return [made_up(chance, depth + 1) for _ in range(chance.choice([0, 1, 3, 20]))]
    return {str(index): made_up(chance, depth + 1) for index in range(chance.randint(0, 4))}


@pytest.mark.parametrize("block", [7, 30, 2**15])
def test_json_in_blocks_is_read_and_written_as_python_does_it(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_messages, "_BLOCK_CHARACTERS", block)
    monkeypatch.setattr(json_messages, "_BLOCK_VALUES", max(2, block // 3))
    monkeypatch.setattr(json_messages, "_FLAT", re.compile(rf'[^\[\]{{}}"]{{0,{block}}}'))
    chance = random.Random(block)
    for _ in range(300):
        value = made_up(chance)
        text = json.dumps(value, indent=chance.choice([None, 1])).encode()
        assert read_json(text) == value
        assert write_json(value) == json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        place = chance.randrange(len(text) + 1)
        others = [b",", b"]", b"[", b" ", b"1", b"", b"NaN", b"1e999", b"{"]
        changed = text[:place] + chance.choice(others) + text[place + chance.randint(0, 2) :]
        assert _read(changed) == _read_by_python(changed), changed


def _read(text: bytes) -> object:
    try:
        return read_json(text)
    except Problem:
        return ValueError


def _read_by_python(text: bytes) -> object:
    try:
        return json.loads(text, parse_constant=json_messages._refuse_constant)
    except ValueError:
        return ValueError


def test_lists_inside_each_other_are_no_work_for_those_around_them() -> None:
    depth, lists = 60, 5000
    text = b'{"x":"\\ud83d\\ude00","y":%s%s%s}' % (b"[" * depth, b",".join([b"[]"] * lists), b"]" * depth)
    assert count_calls(lambda: read_json(text)) < 10 * lists


def test_the_depth_of_json_is_limited() -> None:
    for begin, end in ((b"[", b"]"), (b'{"a":', b"}"), (b'[0,"",{"a":', b"}]")):
        levels = 64 // len(re.findall(rb"[\[{]", begin))
        read_json(begin * levels + b"0" + end * levels)
        with pytest.raises(Problem, match="at most 64 levels"):
            read_json(begin * (levels + 1) + b"0" + end * (levels + 1))
    read_json(b"[%s]" % b",".join([b"[{}]"] * 100))


def test_half_of_a_character_is_found_among_all_escapes() -> None:
    chance = random.Random(3)
    parts = [
        "\\\\",
        "\\ud83d",
        "\\uDE00",
        "\\uD83D\\ude00",
        "\\u0041",
        "ud83d",
        "\\n",
        '\\"',
        "\\ud7ff",
        "\\uE000",
        "x",
    ]
    found = set[bool]()
    for _ in range(2000):
        text = f'["{"".join(chance.choices(parts, k=chance.randint(1, 5)))}"]'
        [value] = json.loads(text)
        is_whole = not re.search("[\ud800-\udfff]", value)
        found.add(is_whole)
        if is_whole:
            assert read_json(text.encode()) == [value]
        else:
            with pytest.raises(Problem, match="half of a character"):
                read_json(text.encode())
    assert found == {False, True}


def test_long_lists_of_numbers_let_other_threads_run() -> None:
    numbers = ",".join(["0"] * 1_000_000)
    tensor = f'{{"name":"images","datatype":"UINT8","shape":[1],"data":[{numbers}]}}'
    body = f'{{"inputs":[{tensor}]}}'.encode()
    incoming = Incoming({}, [], {}, body, BodyLimits(1, 1))
    assert beside_a_thread(lambda: read_infer(incoming, "m", "")) < 0.2
    floats: list[json_messages.Json] = [0.1] * 1_000_000
    assert beside_a_thread(lambda: write_json(floats)) < 0.2


def test_a_refusal_of_json_tells_nothing_of_python() -> None:
    for text in (b"9" * 5000, b"\xff", b"[" * 100_000, b"[NaN]", b'"' * 3_000_000):
        with pytest.raises(Problem) as refused:
            read_json(text)
        assert "sys." not in refused.value.detail and "codec" not in refused.value.detail


def test_a_refusal_does_not_take_the_repeated_text_apart() -> None:
    text = b'{"images":"' + b"aa " * 500_000 + b'"}'
    assert traced_peak(lambda: refusal(text)) < 8 * len(text)


def test_a_value_of_a_wrong_kind_is_refused_without_its_text() -> None:
    text = b'{"images":{"a":[' + b",".join([b"0.1234"] * 150_000) + b"]}}"
    content_bytes = traced_peak(lambda: read_json(text))
    assert traced_peak(lambda: refusal(text)) < content_bytes + len(text)
    assert refusal(text) == "images: a value of the kind object; expected an array"


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        (b'{"images":7}', "images: a value of the kind number; expected an array"),
        (b'{"images":[null]}', "images[0]: a value of the kind null; expected an object"),
        (b'{"images":[[]]}', "images[0]: a value of the kind array; expected an object"),
        (b'{"images":[{"encoded":7}]}', "images[0].encoded: a value of the kind number; expected bytes in base64"),
        (b'{"images":[{"encoded":{}}]}', "images[0].encoded: a value of the kind object; expected bytes in base64"),
        (b'{"images":[{"pixels":"A"}]}', "images[0].pixels: 1 characters that are no base64"),
        (b'{"images":[{"preprocess":"x"}]}', "images[0].preprocess: a value of the kind string; expected one of "),
        (b'{"images":[{"preprocess":{}}]}', "images[0].preprocess: a value of the kind object; expected one of "),
        (b'{"modelName":1}', "modelName: a value of the kind number; expected a string"),
        (b'{"model_name":[]}', "model_name: a value of the kind array; expected a string"),
        (b'{"model_name":"%s"}' % (b"a" * 65537), "model_name: a string of 65537 characters; expected at most 65536"),
        (b'{"[%s":1}' % (b"a" * 65536), "body: a name of 65537 characters; expected at most 65536"),
        (b'{"reconstruction_error":1}', "reconstruction_error: a value of the kind number; expected true or false"),
    ],
)
def test_a_refusal_of_a_message_names_the_field_and_both_kinds(text: bytes, refused: str) -> None:
    assert refusal(text).startswith(refused)


@pytest.mark.parametrize(
    ("member", "refused"),
    [
        (b'"classes":[{}]', "classes[0]: a value of the kind object; expected a whole number"),
        (b'"classes":["%s"]' % (b"9" * 5000), "classes[0]: a value of the kind string; expected a whole number"),
        (b'"classes":[1, true]', "classes[1]: a value of the kind boolean; expected a whole number"),
        (b'"classes":[1.5]', "classes[0]: a number that is not whole; expected a whole number"),
        (b'"classes":[-1]', "classes[0]: a number out of range; expected 0 to 4294967295"),
        (b'"format":"1e0"', "format: a value of the kind string; expected one of "),
        (b'"sweep":[]', "sweep: a value of the kind array; expected an object"),
        (b'"sweep":{"first":1%s}' % (b"0" * 400), "sweep.first: a number out of range; expected "),
        (b'"sweep":{"first":1e39}', "sweep.first: a number out of range; expected "),
        (b'"sweep":{"first":"x"}', "sweep.first: a value of the kind string; expected a number"),
        (b'"image":{"encoded":"A"}', "image.encoded: 1 characters that are no base64"),
    ],
)
def test_a_refusal_of_a_number_names_the_field_and_the_range(member: bytes, refused: str) -> None:
    assert refusal(b"{%s}" % member, capsnet_pb2.ReconstructRequest).startswith(refused)


def test_messages_come_in_all_forms_of_protobufs_mapping() -> None:
    text = b"""{"modelName": null, "model_version": "7", "image": {"pixels": "AA", "preprocess": "PREPROCESS_AUTO"},
        "classes": [3, 4.0, "5", "6e0"], "format": 2, "sweep": {"dimension": "1", "first": "-0.5", "last": 1}}"""
    assert read_message(text, capsnet_pb2.ReconstructRequest, 1) == capsnet_pb2.ReconstructRequest(
        model_version="7", image=capsnet_pb2.Image(pixels=b"\0", preprocess=capsnet_pb2.PREPROCESS_AUTO),
        classes=[3, 4, 5, 6], format=capsnet_pb2.FORMAT_PNG, sweep=capsnet_pb2.Sweep(dimension=1, first=-0.5, last=1),
    )  # fmt: skip


def test_the_limit_of_values_in_json_holds_for_their_memory() -> None:
    limit = 100_000
    numbers = [b"%.6f" % (1 + index / limit) for index in range(limit)]
    items = {
        "numbers": (numbers, 1),
        "lists": ([b"[%s]" % number for number in numbers], 9),
        "objects": ([b'{"%x":[1.5]}' % index for index in range(limit)], 17),
    }
    for name, (texts, values) in items.items():
        text = b"[%s]" % b",".join(texts[: (limit - 8) // values])
        assert traced_peak(partial(read_json, text, max_values=limit)) < 32 * limit + 2 * len(text), name
        with pytest.raises(Problem, match="values, of which each list or object counts as 8"):
            read_json(b"[%s]" % b",".join(texts[: limit // values + 1]), max_values=limit)


def test_a_message_in_json_has_fewer_values_than_a_tensor() -> None:
    limit = 64 * (2 * 1024 + 1024)
    text = b'{"classes":[%s]}' % b",".join([b"0"] * limit)
    assert refusal(text, capsnet_pb2.ReconstructRequest).startswith(f"body: expected at most {limit} values")
    pose = b'{"class_index":1,"pose":[%s]}' % b",".join([b"0.5"] * 16)
    text = b'{"poses":{"poses":[%s]}}' % b",".join([pose] * 1500)
    assert len(read_message(text, capsnet_pb2.ReconstructRequest, 1024).poses.poses) == 1500


def test_the_images_of_a_large_request_may_come_as_lists_of_rows() -> None:
    row = b"[%s]" % b",".join([b"0"] * 28)
    image = b"[[%s]]" % b",".join([row] * 28)
    tensor = b'{"name":"images","datatype":"FP32","shape":[1],"data":[%s]}' % b",".join([image] * 1024)
    incoming = Incoming({}, [], {}, b'{"inputs":[%s]}' % tensor, BodyLimits(1, 1))
    assert len(read_infer(incoming, "m", "").raw_input_contents[0]) == 4 * 1024 * 28 * 28


def test_thousands_of_values_in_parameters_are_refused_before_they_are_read() -> None:
    def read(*texts: str) -> capsnet_pb2.ReconstructRequest:
        query = [("changes", text) for text in texts]
        return from_pictures(
            Incoming({}, query, {"content-type": "image/png"}, b"x", BodyLimits(1, 1)), capsnet_pb2.ReconstructRequest
        )

    changes = ",".join(["0:1"] * 512)
    assert len(read(changes, changes).changes) == 1024
    for texts in (("0:1", changes, changes), ("," * 1024,)):
        with pytest.raises(Problem, match="changes: 1025 values in all lists so far; expected at most 1024"):
            read(*texts)


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("request_bytes", [b"", b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20])
def test_nothing_of_a_connection_stays_until_a_garbage_collection(
    reset: bool, request_bytes: bytes, monkeypatch: pytest.MonkeyPatch, no_collection: None
) -> None:
    made: list[weakref.ref[WebConnection]] = []
    connect = server_module.WebServer._connect

    def connected(server: server_module.WebServer) -> WebConnection:
        connection = connect(server)
        made.append(weakref.ref(connection))
        return connection

    monkeypatch.setattr(server_module.WebServer, "_connect", connected)
    with serving({}) as web, closing(socket.create_connection(("127.0.0.1", web.port), PATIENCE)) as link:
        link.sendall(request_bytes)
        if request_bytes:
            link.recv(1)
        if reset:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_for(lambda: made)
        link.close()
        wait_for(lambda: made[0]() is None)


def test_heads_with_thousands_of_parameters_are_refused_before_these_are_read() -> None:
    with serving({"/capsnet.v1.CapsNetService/Classify": describing(), GET_MODEL: describing()}) as web:
        long = ask(web.port, "/v1/classify", b"x", content_type='image/png;"' + ";" * 15_000)
        assert (long.status, b"at most 8 parameters" in long.body) == (400, True)
        query = ask(web.port, "/v1/model?" + "a&" * 7000)
        assert (query.status, b"at most 64" in query.body) == (400, True)
        kind = "multipart/form-data; boundary=edge"
        part = b'--edge\r\nContent-Disposition: form-data; name=image;"' + b";" * 4000 + b"\r\n\r\nx\r\n--edge--\r\n"
        form = ask(web.port, "/v1/classify", part, content_type=kind)
        assert (form.status, b"at most 8 parameters" in form.body) == (400, True)
