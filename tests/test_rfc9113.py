"""The MUSTs of HTTP/2 (RFC 9113) that a server can be tested for, on the native transport: one row for each.

A row names the section, the client's frames, and the right reaction. OTHER_TESTS names the tests of rules that need
more than one row, and EXCEPTIONS the rules that this server does not follow, with the reason.
"""

import ast
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

import pytest

from serving.transport import frames
from serving.transport.frames import ErrorCode
from tests.conftest import ROOT
from tests.raw_client import HEADERS, Raw, data, framed, headers, literal
from tests.transport_methods import Serving, serve


class Ends(NamedTuple):
    """A connection error: GOAWAY with this code, and the connection is closed (section 5.4.1)."""

    code: ErrorCode


class Resets(NamedTuple):
    """A stream error: RST_STREAM with this code on stream 1, which is not answered. The connection goes on."""

    code: ErrorCode


class Continues(NamedTuple):
    """No error. The connection goes on. message: the answer on stream 1, None if it may have none."""

    message: bytes | None = None


class Row(NamedTuple):
    """A rule: its section, the bytes that a client sends after its preface, and the reaction."""

    section: str
    sent: Callable[[Raw], bytes]
    reaction: Ends | Resets | Continues


PROTOCOL, FRAME_SIZE = Ends(ErrorCode.PROTOCOL_ERROR), Ends(ErrorCode.FRAME_SIZE_ERROR)
COMPRESSION, FLOW_CONTROL = Ends(ErrorCode.COMPRESSION_ERROR), Ends(ErrorCode.FLOW_CONTROL_ERROR)
MALFORMED = Resets(ErrorCode.PROTOCOL_ERROR)
CLOSED = Resets(ErrorCode.STREAM_CLOSED)
ALL = frames.END_HEADERS | frames.END_STREAM


def opened(raw: Raw, stream: int = 1) -> bytes:
    """Open a stream whose handler waits for a minute once it has the request."""
    return headers(stream, raw.block("/test.Test/Wait"))


def half_closed(raw: Raw) -> bytes:
    """Open stream 1, and end the client's half."""
    return opened(raw) + data(1, framed(b"60"))


def closed(raw: Raw) -> bytes:
    """Open stream 1, and let both sides end it."""
    return headers(1, raw.block("/nothing"), ALL)


def cancelled(raw: Raw) -> bytes:
    """Open stream 1, and reset it."""
    return opened(raw) + frames.reset(1, ErrorCode.CANCEL)


def trailers(raw: Raw, flags: int = ALL) -> bytes:
    return headers(1, raw.encoder.encode([("x", "y")]), flags)


def echo(raw: Raw, *, before: bytes = b"", between: bytes = b"") -> bytes:
    """Make a call on stream 1 that is answered with b"a", with bytes before it and between its two frames."""
    return before + headers(1, raw.block()) + between + data(1, framed(b"a"))


ANSWERED, ALIVE = Continues(b"a"), Continues()

ROWS: dict[str, Row] = {
    "settings come first": Row("3.4", lambda raw: b"", ALIVE),
    "a flag without meaning is ignored": Row(
        "4.1", lambda raw: headers(1, raw.block(), 0x04 | 0x42) + data(1, framed(b"a"), 0x01 | 0xF6), ANSWERED
    ),
    "the reserved bit is ignored": Row(
        "4.1", lambda raw: headers(2**31 + 1, raw.block()) + data(2**31 + 1, framed(b"a")), ANSWERED
    ),
    "a frame of an unknown type is ignored": Row(
        "4.1", lambda raw: echo(raw, between=frames.frame(0xBB, 0xFF, 1, b"?" * 100)), ANSWERED
    ),
    "a frame of 16,384 bytes is taken": Row(
        "4.2", lambda raw: echo(raw, before=frames.frame(0xBB, 0, 0, bytes(16384))), ANSWERED
    ),
    "a frame is too large": Row("4.2", lambda raw: opened(raw) + data(1, bytes(16385)), FRAME_SIZE),
    "headers are shorter than their priority": Row("4.2", lambda raw: headers(1, b"abc", 0x24), FRAME_SIZE),
    "headers cannot be read": Row("4.3", lambda raw: headers(1, b"\xff\xff\xff\xff\xff"), COMPRESSION),
    "headers of a refused call cannot be read": Row(
        "4.3", lambda raw: closed(raw) + headers(1, b"\xff\xff\xff\xff\xff"), COMPRESSION
    ),
    "headers are far too large once they are read": Row(
        "4.3",
        lambda raw: headers(1, literal("a", "b" * 100) + b"\x40\x01c\x7f\xa1\x1e" + b"d" * 4000 + b"\xbe" * 50),
        COMPRESSION,
    ),
    "the table is resized three times": Row(
        "4.3.1", lambda raw: headers(1, b"\x20\x21\x22" + raw.block()), COMPRESSION
    ),
    "the table is resized to more than is allowed": Row(
        "4.3.1", lambda raw: headers(1, b"\x3f\xe2\x1f" + raw.block()), COMPRESSION
    ),
    "idle: data": Row("5.1", lambda raw: data(1, b"a"), PROTOCOL),
    "idle: a window": Row("5.1", lambda raw: frames.window_update(1, 5), PROTOCOL),
    "idle: a continuation": Row("5.1", lambda raw: frames.frame(frames.CONTINUATION, 4, 1), PROTOCOL),
    "idle: a priority": Row(
        "5.1", lambda raw: echo(raw, before=frames.frame(frames.PRIORITY, 0, 9, bytes(5))), ANSWERED
    ),
    "half-closed (remote): data": Row("5.1", lambda raw: half_closed(raw) + data(1, b"a"), CLOSED),
    "half-closed (remote): headers": Row("5.1", lambda raw: half_closed(raw) + trailers(raw), CLOSED),
    "half-closed (remote): a window and a priority": Row(
        "5.1",
        lambda raw: echo(raw) + frames.window_update(1, 5) + frames.frame(frames.PRIORITY, 0, 1, bytes(5)),
        ANSWERED,
    ),
    "closed by both: data": Row("5.1", lambda raw: closed(raw) + data(1, b"a"), CLOSED),
    "closed by both: headers": Row("5.1", lambda raw: closed(raw) + trailers(raw), CLOSED),
    "closed by both: a window and a reset": Row(
        "5.1", lambda raw: echo(raw) + frames.window_update(1, 5) + frames.reset(1, ErrorCode.CANCEL), ALIVE
    ),
    "closed by the client's reset: data": Row("5.1", lambda raw: cancelled(raw) + data(1, b"a"), CLOSED),
    "closed by the client's reset: headers": Row("5.1", lambda raw: cancelled(raw) + trailers(raw), CLOSED),
    "closed by the server's reset: frames on their way are ignored": Row(
        "5.1",
        lambda raw: opened(raw) + frames.window_update(1, 0) + data(1, b"a", 0) + trailers(raw, 0x04) + data(1, b"b"),
        MALFORMED,
    ),
    "a stream that only a server may open": Row("5.1.1", lambda raw: headers(2, raw.block()), PROTOCOL),
    "data of a stream that only a server may open": Row("5.1.1", lambda raw: echo(raw) + data(2, b"a"), PROTOCOL),
    "a stream after a higher one": Row("5.1.1", lambda raw: opened(raw, 5) + opened(raw, 3), PROTOCOL),
    "a reset is not answered by a reset": Row(
        "5.4.2", lambda raw: cancelled(raw) + frames.reset(1, ErrorCode.CANCEL), ALIVE
    ),
    "a frame of an unknown type within headers": Row(
        "5.5", lambda raw: headers(1, raw.block(), 0) + frames.frame(0xBB, 0, 1), PROTOCOL
    ),
    "data of no stream": Row("6.1", lambda raw: data(0, b"a"), PROTOCOL),
    "padding as long as its frame": Row("6.1", lambda raw: opened(raw) + data(1, b"\x05abc", frames.PADDED), PROTOCOL),
    "padding without its length": Row("6.1", lambda raw: opened(raw) + data(1, b"", frames.PADDED), PROTOCOL),
    "padding as long as its frame, on a closed stream": Row(
        "6.1", lambda raw: closed(raw) + data(1, b"\x05abc", frames.PADDED), PROTOCOL
    ),
    "headers of no stream": Row("6.2", lambda raw: headers(0, raw.block()), PROTOCOL),
    "padding as long as its headers": Row("6.2", lambda raw: headers(1, b"\x05abc", 0x04 | frames.PADDED), PROTOCOL),
    "headers interrupted by another stream's": Row("6.2", lambda raw: headers(1, b"", 0) + headers(3, b""), PROTOCOL),
    "headers interrupted by a ping": Row(
        "6.2", lambda raw: headers(1, b"", 0) + frames.frame(frames.PING, 0, 0, bytes(8)), PROTOCOL
    ),
    "headers interrupted by data of their stream": Row("6.2", lambda raw: headers(1, b"", 0) + data(1, b"a"), PROTOCOL),
    "a priority of no stream": Row("6.3", lambda raw: frames.frame(frames.PRIORITY, 0, 0, bytes(5)), PROTOCOL),
    "a priority of three bytes": Row(
        "6.3", lambda raw: opened(raw) + frames.frame(frames.PRIORITY, 0, 1, b"abc"), Resets(ErrorCode.FRAME_SIZE_ERROR)
    ),
    "a priority of three bytes for a closed stream": Row(
        "6.3", lambda raw: closed(raw) + frames.frame(frames.PRIORITY, 0, 1, b"abc"), Resets(ErrorCode.FRAME_SIZE_ERROR)
    ),
    "a priority of three bytes for an idle stream": Row(
        "6.3", lambda raw: frames.frame(frames.PRIORITY, 0, 1, b"abc"), FRAME_SIZE
    ),
    "a reset of no stream": Row("6.4", lambda raw: frames.reset(0, ErrorCode.CANCEL), PROTOCOL),
    "a reset of an idle stream": Row("6.4", lambda raw: frames.reset(1, ErrorCode.CANCEL), PROTOCOL),
    "a reset of two bytes": Row(
        "6.4", lambda raw: opened(raw) + frames.frame(frames.RST_STREAM, 0, 1, b"12"), FRAME_SIZE
    ),
    "settings that acknowledge and set": Row(
        "6.5", lambda raw: frames.frame(frames.SETTINGS, frames.ACK, 0, bytes(6)), FRAME_SIZE
    ),
    "settings of a stream": Row("6.5", lambda raw: frames.frame(frames.SETTINGS, 0, 1), PROTOCOL),
    "settings of five bytes": Row("6.5", lambda raw: frames.frame(frames.SETTINGS, 0, 0, bytes(5)), FRAME_SIZE),
    "a setting for push of 2": Row("6.5.2", lambda raw: frames.settings({frames.ENABLE_PUSH: 2}), PROTOCOL),
    "a setting for a window of 2^31": Row(
        "6.5.2", lambda raw: frames.settings({frames.INITIAL_WINDOW_SIZE: 2**31}), FLOW_CONTROL
    ),
    "a setting for small frames": Row("6.5.2", lambda raw: frames.settings({frames.MAX_FRAME_SIZE: 16383}), PROTOCOL),
    "a setting for huge frames": Row("6.5.2", lambda raw: frames.settings({frames.MAX_FRAME_SIZE: 2**24}), PROTOCOL),
    "a setting without meaning is ignored": Row(
        "6.5.2", lambda raw: echo(raw, before=frames.settings({0xFF: 7})), ANSWERED
    ),
    "the last of several values of a setting holds": Row(
        "6.5.3",
        lambda raw: echo(raw, before=frames.frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\0\0\4\0\0\0\x64")),
        ANSWERED,
    ),
    "a push": Row("6.6", lambda raw: opened(raw) + frames.frame(frames.PUSH_PROMISE, 4, 1, bytes(8)), PROTOCOL),
    "a ping of a stream": Row("6.7", lambda raw: frames.frame(frames.PING, 0, 1, bytes(8)), PROTOCOL),
    "a ping of seven bytes": Row("6.7", lambda raw: frames.frame(frames.PING, 0, 0, bytes(7)), FRAME_SIZE),
    "a farewell on a stream": Row("6.8", lambda raw: frames.frame(frames.GOAWAY, 0, 1, bytes(8)), PROTOCOL),
    "a farewell of seven bytes": Row("6.8", lambda raw: frames.frame(frames.GOAWAY, 0, 0, bytes(7)), FRAME_SIZE),
    "a window of 0 for a stream": Row("6.9", lambda raw: opened(raw) + frames.window_update(1, 0), MALFORMED),
    "a window of 0 for the connection": Row("6.9", lambda raw: frames.window_update(0, 0), PROTOCOL),
    "a window of three bytes": Row("6.9", lambda raw: frames.frame(frames.WINDOW_UPDATE, 0, 0, b"abc"), FRAME_SIZE),
    "a stream's window gets too large": Row(
        "6.9.1",
        lambda raw: opened(raw) + frames.window_update(1, 2**31 - 1),
        Resets(ErrorCode.FLOW_CONTROL_ERROR),
    ),
    "the connection's window gets too large": Row(
        "6.9.1", lambda raw: frames.window_update(0, 2**31 - 1), FLOW_CONTROL
    ),
    "the windows of streams get too large by settings": Row(
        "6.9.2",
        lambda raw: opened(raw) + frames.window_update(1, 2**30) + frames.settings({frames.INITIAL_WINDOW_SIZE: 2**30}),
        FLOW_CONTROL,
    ),
    "a continuation of no stream": Row(
        "6.10", lambda raw: headers(1, b"", 0) + frames.frame(frames.CONTINUATION, 4, 0), PROTOCOL
    ),
    "a continuation of another stream": Row(
        "6.10", lambda raw: headers(1, b"", 0) + frames.frame(frames.CONTINUATION, 4, 3), PROTOCOL
    ),
    "a continuation after the end of headers": Row(
        "6.10", lambda raw: opened(raw) + frames.frame(frames.CONTINUATION, 4, 1), PROTOCOL
    ),
    "an unknown error code": Row(
        "7", lambda raw: opened(raw, 1) + frames.frame(frames.RST_STREAM, 0, 1, b"\0\0\0\xff"), ALIVE
    ),
    "headers twice": Row("8.1", lambda raw: opened(raw) + headers(1, raw.block()), MALFORMED),
    "trailers with a pseudo-header": Row(
        "8.1", lambda raw: opened(raw) + headers(1, raw.encoder.encode([(":path", "/test.Test/Echo")]), ALL), MALFORMED
    ),
    "trailers that are another request": Row("8.1", lambda raw: opened(raw) + headers(1, raw.block(), ALL), MALFORMED),
    "trailers without the end": Row("8.1", lambda raw: opened(raw) + trailers(raw, 0x04), MALFORMED),
    "a request that is shorter than it says": Row(
        "8.1.1",
        lambda raw: headers(1, raw.block("/test.Test/Wait", ("content-length", "9"))) + data(1, b"a"),
        MALFORMED,
    ),
    "a request without data that says otherwise": Row(
        "8.1.1", lambda raw: headers(1, raw.block("/test.Test/Wait", ("content-length", "9")), ALL), MALFORMED
    ),
    "trailers with a capital letter": Row(
        "8.2.1", lambda raw: opened(raw) + headers(1, literal("X", "a"), ALL), MALFORMED
    ),
}


def request(*fields: tuple[str, str]) -> bytes:
    """Return a header block with each field written as it is."""
    return b"".join(literal(*field) for field in fields)


def changed(name: str, value: str) -> bytes:
    """Return the header block of a request in which one header has another value."""
    return request(*((key, value if key == name else before) for key, before in HEADERS))


#: By name, the section and the header block.
MALFORMED_REQUESTS: dict[str, tuple[str, bytes]] = {
    "a capital letter in a name": ("8.2.1", request(*HEADERS, ("X-Key", "value"))),
    "a space in a name": ("8.2.1", request(*HEADERS, ("a b", "c"))),
    "a colon in a name": ("8.2.1", request(*HEADERS, ("a:b", "c"))),
    "a name without characters": ("8.2.1", request(*HEADERS, ("", "c"))),
    "a zero in a value": ("8.2.1", request(*HEADERS, ("x-key", "a\0b"))),
    "a line break in a value": ("8.2.1", request(*HEADERS, ("x-key", "a\r\nb: c"))),
    "a space before a value": ("8.2.1", request(*HEADERS, ("x-key", " a"))),
    "a tab after a value": ("8.2.1", request(*HEADERS, ("x-key", "a\t"))),
    "connection": ("8.2.2", request(*HEADERS, ("connection", "close"))),
    "transfer-encoding": ("8.2.2", request(*HEADERS, ("transfer-encoding", "chunked"))),
    "another te": ("8.2.2", request(*HEADERS[:-1], ("te", "gzip"))),
    "an unknown pseudo-header": ("8.3", request(*HEADERS[:4], (":other", "a"), *HEADERS[4:])),
    "an answer's pseudo-header": ("8.3", request(*HEADERS[:4], (":status", "200"), *HEADERS[4:])),
    "a pseudo-header after others": ("8.3", request(*HEADERS[1:], HEADERS[0])),
    "two paths": ("8.3", request(*HEADERS[:3], *HEADERS[2:])),
    "no path": ("8.3.1", request(*(field for field in HEADERS if field[0] != ":path"))),
    "no method": ("8.3.1", request(*HEADERS[1:])),
    "no scheme": ("8.3.1", request(HEADERS[0], *HEADERS[2:])),
    "an empty path": ("8.3.1", changed(":path", "")),
    "a path that begins without a slash": ("8.3.1", changed(":path", "test.Test/Echo")),
    "an empty method": ("8.3.1", changed(":method", "")),
    "an empty scheme": ("8.3.1", changed(":scheme", "")),
    "a user in the authority": ("8.3.1", changed(":authority", "user@localhost")),
    "another host than the authority": ("8.3.1", request(*HEADERS, ("host", "other"))),
    "an empty authority's user": ("8.3.1", changed(":authority", "@")),
    "CONNECT with a path": ("8.5", changed(":method", "CONNECT")),
}

#: By section, the tests of rules about what this server sends, or that need more than one step.
OTHER_TESTS = {
    "3.3": "test_access_served.py::test_old_versions_of_tls_and_other_protocols_are_refused",
    "3.4": "test_transport_faults.py::test_another_protocol_is_closed",
    "4.3.1": "test_transport_frames.py::test_a_client_that_wants_a_smaller_table_for_headers_gets_it",
    "5.1.2": "test_transport_frames.py::test_more_calls_than_are_allowed_can_be_tried_elsewhere",
    "5.2.1": "test_transport_frames.py::test_the_connections_window_holds_for_all_streams_together",
    "6.5.3": "test_rfc9113.py::test_the_preface_and_settings_and_pings_are_answered_in_their_order",
    "6.7": "test_transport_frames.py::test_pings_are_answered",
    "6.8": "test_transport_stops.py::test_a_stop_takes_what_was_sent_before_the_client_knew",
    "6.9": "test_transport_frames.py::test_the_windows_are_filled_up_again",
    "6.9.2": "test_rfc9113.py::test_windows_of_calls_without_an_answer_yet_follow_the_settings",
    "8.1.1": "test_transport_faults.py::test_a_request_that_ends_with_trailers_must_be_as_long_as_it_says",
    "8.3.2": "test_transport_frames.py::test_a_strict_peer_finds_nothing_wrong",
    "8.7": "test_transport_frames.py::test_more_calls_than_are_allowed_can_be_tried_elsewhere",
    "10.5.1": "test_headers.py::test_a_block_that_is_too_large_leaves_the_table_as_it_should_be",
}

#: By section, the rules that this server does not follow, and the reason.
EXCEPTIONS = {
    "8.2.3": "cookies are metadata of gRPC, which keeps each field; no HTTP application reads them",
    "8.5": "gRPC has no CONNECT: such a request is malformed, also in its own form without a path",
}


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    """A server for all rows: no row may hurt it."""
    with serve() as running:
        yield running


@pytest.mark.parametrize("name", ROWS)
def test_a_rule_is_kept(serving: Serving, raw: Raw, name: str) -> None:
    _, sent, reaction = ROWS[name]
    with suppress(ConnectionError):  # the server may need no more of it
        raw.send(sent(raw))
    if isinstance(reaction, Ends):
        assert raw.why_closed() == reaction.code
        assert len(raw.went_away) == 1
        raw = Raw(serving.port)  # others are served as before
    raw.encoder.header_table_size = 0  # the server may have none of the entries of blocks above
    raw.call(101, b"later")
    assert raw.read(101).messages == [b"later"]
    first = raw.answers[1]
    if isinstance(reaction, Resets):
        assert first.reset == reaction.code and not first.messages and first.resets == 1
    elif isinstance(reaction, Continues):
        assert first.reset in (None, ErrorCode.NO_ERROR) and not raw.went_away
        assert reaction.message is None or (first.messages == [reaction.message] and first.ended)
    if isinstance(reaction, Ends):
        raw.socket.close()


@pytest.mark.parametrize("name", MALFORMED_REQUESTS)
def test_a_malformed_request_resets_its_stream_alone(serving: Serving, raw: Raw, name: str) -> None:
    raw.call(1, b"a")
    for stream in (3, 5):  # the second time from memory, if it were remembered
        raw.send(headers(stream, MALFORMED_REQUESTS[name][1]) + data(stream, framed(b"a")))
        assert raw.read(stream).reset == ErrorCode.PROTOCOL_ERROR
    raw.call(7, b"b")
    assert raw.read(7).messages == [b"b"]
    assert [raw.answers[stream].resets for stream in (1, 3, 5)] == [0, 1, 1]


def test_the_preface_and_settings_and_pings_are_answered_in_their_order(serving: Serving, raw: Raw) -> None:
    raw.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 100}) + frames.frame(frames.PING, 0, 0, b"12345678"))
    raw.send(frames.frame(frames.PING, frames.ACK, 0, b"87654321"))  # an answer, which is not answered
    raw.call(1, b"a")
    raw.read(1)
    kinds = [(kind, flags) for kind, flags, stream in raw.order if not stream and kind != frames.WINDOW_UPDATE]
    acknowledged = (frames.SETTINGS, frames.ACK)
    assert kinds == [(frames.SETTINGS, 0), acknowledged, acknowledged, (frames.PING, frames.ACK)]
    assert raw.pings == [b"12345678"]


@pytest.mark.parametrize("before,after", [(65535, 10), (10, 65535), (0, 1), (20, 10)])
def test_windows_of_calls_without_an_answer_yet_follow_the_settings(serving: Serving, before: int, after: int) -> None:
    raw = Raw(serving.port, settings={frames.INITIAL_WINDOW_SIZE: before})
    raw.send(headers(1, raw.block()) + frames.settings({frames.INITIAL_WINDOW_SIZE: after}))
    raw.send(data(1, framed(b"a" * 60)))
    for window in range(after, 65, 20):
        raw.send(frames.frame(frames.PING, 0, 0, window.to_bytes(8)))
        while window.to_bytes(8) not in raw.pings or len(raw.answers[1].data) < window:
            raw.read_some()
        assert len(raw.answers[1].data) == window
        raw.send(frames.window_update(1, 20))
    assert raw.read(1).messages == [b"a" * 60]
    raw.socket.close()


@pytest.mark.parametrize("section", OTHER_TESTS)
def test_the_tests_of_other_rules_are_there(section: str) -> None:
    file, _, name = OTHER_TESTS[section].partition("::")
    functions = [
        node for node in ast.parse((ROOT / "tests" / file).read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    assert name in {function.name for function in functions}


#: The sections with a MUST for a server that is no intermediary, pushes nothing and does not act as a client.
SECTIONS = """
3.3 3.4 4.1 4.2 4.3 4.3.1 5.1 5.1.1 5.1.2 5.2.1 5.4.2 5.5 6.1 6.2 6.3 6.4 6.5 6.5.2 6.5.3 6.6 6.7 6.8 6.9 6.9.1 6.9.2
6.10 7 8.1 8.1.1 8.2.1 8.2.2 8.2.3 8.3 8.3.1 8.3.2 8.5 8.7 10.5.1
"""


def test_every_section_with_a_rule_for_servers_has_a_test_or_a_reason() -> None:
    malformed = {section for section, _ in MALFORMED_REQUESTS.values()}
    assert {row.section for row in ROWS.values()} | malformed | OTHER_TESTS.keys() | EXCEPTIONS.keys() == set(
        SECTIONS.split()
    )
