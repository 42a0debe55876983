"""The reception of a connection: it accepts or refuses new calls."""

import grpc

from serving.transport import headers
from serving.transport.frames import ErrorCode
from serving.transport.headers import RequestHead, Status
from serving.transport.methods import UNDECIDED, Method, StreamMethod
from serving.transport.receiving import StreamCall, UnaryCall
from serving.transport.streams import OpenCall, Streams, StreamState


class Reception:
    """The part of a connection that accepts calls, or answers them from their headers alone."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        # In the bytes that are being read: the new calls; the streams of calls that a door has accepted and that are
        # not complete yet; and the answered streams, half-closed (local) until the client has sent the rest.
        self._opened: list[OpenCall] = []
        self._expected: set[int] = set()
        self._unwanted: set[int] = set()

    def open(self, stream: int, head: RequestHead[Method], end: bool) -> None:
        """Take a new call. end: True if its client has sent everything."""
        method = head.method
        if not head.acceptable or method is None:
            self._answer(stream, self._turned_away(head), end)
            return
        status = None
        if method.door:
            status = method.door(head.timeout, head.metadata, len(self._expected), self._streams.client)
            if status is not None and status is not UNDECIDED:
                self._answer(stream, status.block, end)
                return
            self._expected.add(stream)
        streams = self._streams
        many = isinstance(method, StreamMethod)
        call = StreamCall(streams, stream, head) if many else UnaryCall(streams, stream, head)
        if status is UNDECIDED:
            call.undecided = True
        streams.calls[stream] = call
        self._opened.append(call)
        memory = streams.memory
        if memory.used > memory.max_bytes:
            memory.make_room(call)
        if head.timeout_error:
            call.refuse(grpc.StatusCode.INTERNAL, f"grpc-timeout: {head.timeout_error!r} is not a timeout")
        if many and not call.over:
            call.begin()
        if end:
            call.end()
        if end or call.over:
            self.came_in_full(stream)

    def came_in_full(self, stream: int) -> None:
        """Note that a client sends nothing else on a stream."""
        self._expected.discard(stream)
        if self._unwanted:
            self._unwanted.discard(stream)

    def late(self, stream: int) -> None:
        """Take a frame for a stream without a call. Raises ConnectionFault."""
        if stream not in self._unwanted:
            self._streams.refuse_late(stream)

    def all_read(self) -> None:
        """Note that all received bytes are read. The rest of a call may never come, so it must not cause refusals."""
        self._expected.clear()
        for call in self._opened:
            if call.state is StreamState.OPEN:
                call.wait_for_client()
        self._opened.clear()
        if self._unwanted:  # their clients need not send the rest
            for stream in self._unwanted:
                self._streams.send_reset(stream, ErrorCode.NO_ERROR)
            self._unwanted.clear()

    def _turned_away(self, head: RequestHead[Method]) -> bytes:
        """Return the header block that answers a request which no method can take."""
        if head.http_status != 200:
            return headers.write([(":status", str(head.http_status))])
        if head.size > headers.MAX_BYTES:
            text = f"metadata: {head.size} bytes; the limit is {headers.MAX_BYTES} bytes"
            status = Status(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        elif head.method is None:
            status = Status(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        else:
            known = (("grpc-accept-encoding", ",".join(headers.KNOWN_ENCODINGS)),)
            status = Status(grpc.StatusCode.UNIMPLEMENTED, "grpc-encoding: not one of grpc-accept-encoding", known)
        self._streams.limits.refused(head.path, self._streams.client, head.metadata, status.code, status.text)
        return status.block

    def _answer(self, stream: int, block: bytes, end: bool) -> None:
        """Answer with only a header block. Later data of the client is refused."""
        self._streams.send_headers(stream, block, end_stream=True)
        if not end:  # in most cases the rest has come with the headers
            self._unwanted.add(stream)
