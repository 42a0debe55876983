"""A connection of HTTP/1.1: uvicorn's protocol, with the limits of this server.

Bytes are parsed in turns of about a millisecond, so that tiny chunks of one client do not hold up the others, and those
of later requests wait outside the parser, which would take any number of them.
"""

import asyncio
import re
import sys
from collections.abc import Callable, Coroutine
from time import perf_counter, thread_time
from typing import Protocol, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from serving.transport.backlog import Backlog
from serving.transport.connection_limits import FLOOD, IDLE, UNREAD
from serving.transport.frame_reader import HEADER_SECONDS
from serving.transport.memory import STALL_SECONDS, Memory
from serving.transport.methods import Peer, client_of, peer_of
from serving.transport.records import Records, records_of
from serving.transport.rounds import Place, Result, Rounds
from serving.web.body import BodyReader
from serving.web.problems import PROBLEM, Problem

#: The most bytes of a request's line and headers.
MAX_HEAD_BYTES = 16384
#: The most lines of a head.
MAX_HEAD_LINES = 128
#: The most bytes of an answer that are written before the client has taken those before them.
MAX_UNSENT_BYTES = 16384
#: Seconds without a request after which a connection is closed.
KEEP_ALIVE_SECONDS = 75.0
# The most bytes that wait to be parsed before no more are read, beside those of one read.
_MAX_ARRIVED_BYTES = 65536
_TURN_SECONDS = 0.001
# The bytes that are parsed before the clock is looked at: the fewest after a piece that has taken a turn, such as one
# of tiny chunks, and twice as many after each other one.
_MIN_PIECE_BYTES, _MAX_PIECE_BYTES = 128, 4096
_HEAD_END = re.compile(rb"\n\r?\n")


class Owner(Protocol):
    """The server of a connection. memory: as of serving.web.application.Terms. rounds: of its connections."""

    memory: Memory
    rounds: Rounds

    def opened(self, connection: "WebConnection", /) -> bool:
        """Count a connection. Return False if a limit refuses it."""

    def lost(self, connection: "WebConnection", /) -> None:
        """Note the end of a counted connection."""

    def malformed(self, status: int, peer: Peer, /) -> None:
        """Count and log a request that is no HTTP/1.1."""

    def limited(self, limit: str, peer: Peer, /) -> None:
        """Count and log that a limit has ended a connection."""


class _Flow(FlowControl):
    """The flow of a connection. Nothing is read while much waits to be parsed.

    go_on: called when more may be parsed.
    """

    def __init__(self, transport: asyncio.Transport, arrived: bytearray, go_on: Callable[[], None]) -> None:
        super().__init__(transport)
        self._arrived = arrived
        self._go_on = go_on

    def pause_reading(self) -> None:
        self.read_paused = True
        self._transport.pause_reading()  # also if it seems to be paused: uvicorn resumes it by itself

    def resume_reading(self) -> None:
        if len(self._arrived) < _MAX_ARRIVED_BYTES:
            super().resume_reading()
        self._go_on()

    def end(self) -> None:
        """Forget the connection, which refers to its flow."""
        self._go_on = _do_nothing


def _do_nothing() -> None:
    pass


class WebConnection(H11Protocol):
    """A connection, between uvicorn's parser and its application."""

    def __init__(self, config: Config, state: ServerState, owner: Owner) -> None:
        super().__init__(config, state, {}, asyncio.get_running_loop())
        self._owner = owner
        self.peer = Peer("")
        self.client_key = ""
        #: As of serving.transport.memory.Owner. It has one request at a time.
        self.held = 0
        self.holders: tuple[()] | tuple[BodyReader] = ()
        #: True if the connection ends for the sake of a new one.
        self.replaced = False
        self._counted = False
        self._when_lost: Callable[[], object] | None = None
        self._records: Records | None = None
        self._in_head = True  # since a connection must begin with a request
        self._since = 0.0  # of the present head, or of the end of the last request
        self._arrived = bytearray()  # the bytes that are not parsed yet
        self._backlog = Backlog(owner.memory, self, self._end_for_room)
        self._piece_bytes = _MIN_PIECE_BYTES
        self._place = Place(owner.rounds, self._take_turn)
        self._unsent = (0, 0.0)  # the bytes that wait to be read, and the time since which they are so many

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.peer = peer_of(transport.get_extra_info("peername"), transport.get_extra_info("peercert"))
        self.client_key = client_of(self.peer.address)
        self._since = self.loop.time()
        self._counted = self._owner.opened(self)
        if not self._counted:
            self.transport = transport
            transport.abort()
            return
        super().connection_made(transport)
        transport.set_write_buffer_limits(MAX_UNSENT_BYTES)
        self._records = records_of(transport)
        self.flow = _Flow(transport, self._arrived, self._go_on)
        self.app_state = {"connection": self}

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._counted:
            return
        self._owner.lost(self)
        super().connection_lost(exc)
        # Otherwise a connection with its TLS would live until a garbage collection, or its timer after a reset.
        self._unset_keepalive_if_required()
        cast(_Flow, self.flow).end()
        self._arrived.clear()
        self._backlog.gone()
        self._place.leave()
        del self._backlog  # which refers to this object
        self._tell_lost()
        self.app_state = {}

    def data_received(self, data: bytes) -> None:
        if self._records and self._records.are_tiny(len(data)):
            self._owner.limited(FLOOD, self.peer)
            self.transport.abort()
            return
        self._arrived += data
        if len(self._arrived) >= _MAX_ARRIVED_BYTES:
            self.flow.pause_reading()
        if self._place.waits:
            self._backlog.measure(len(self._arrived))
        elif self._place.may_go_on():
            self._take_turn()
        else:
            self._place.wait()
            self._backlog.measure(len(self._arrived))

    def on_response_complete(self) -> None:
        self._place.prove()
        self._since = self.loop.time()
        self._in_head = bool(self.conn.trailing_data[0] or self._arrived)
        super().on_response_complete()

    def in_turns(self, work: Coroutine[object, None, Result]) -> Coroutine[object, None, Result]:
        """Return what runs a part of a handler in turns with the work of other clients."""
        return self._place.in_turns(work)

    def watch(self, lost: Callable[[], object] | None) -> None:
        """Call a function if the client goes, from now on; None for no function."""
        self._when_lost = lost
        if lost:
            self.flow.resume_reading()  # otherwise the client's end would not be seen
            if self.cycle.disconnected:
                self._tell_lost()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP/1.1, if nothing was answered yet, and close the connection."""
        error = sys.exc_info()[1]
        self._refuse(error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400)

    def _refuse(self, status: int) -> None:
        self._arrived.clear()
        self._owner.malformed(status, self.peer)
        if self.cycle and not self.cycle.response_complete:  # the end of a body whose request is being handled
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._tell_lost()
        if self.conn.our_state is not h11.IDLE:
            self.transport.abort()
            return
        text = (
            f"this is no request of HTTP/1.1 with at most {MAX_HEAD_BYTES} bytes and {MAX_HEAD_LINES} lines of "
            "headers; gRPC has its own port"
        )
        body = Problem(status, text).body()
        headers = [("content-type", PROBLEM), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            if sent := self.conn.send(event):
                self.transport.write(sent)
        self.transport.close()

    def check(self, now: float) -> None:
        """Close the connection if its client does not bring it further."""
        if self._records and self._records.are_empty():
            self._owner.limited(FLOOD, self.peer)
            self.transport.abort()
            return
        unsent = self.transport.get_write_buffer_size()
        if unsent != self._unsent[0]:
            self._unsent = (unsent, now)
        elif unsent and now - self._unsent[1] >= STALL_SECONDS:
            self._owner.limited(UNREAD, self.peer)
            self.transport.abort()
            return
        if not self._busy and self._in_head and now - self._since >= HEADER_SECONDS:
            self._owner.limited(IDLE, self.peer)
            self.transport.abort()

    def idle_seconds(self, now: float) -> float:
        """Return the seconds without a request; 0 if there is one, or if the connection is ending."""
        return 0.0 if self._busy or self.transport.is_closing() else now - self._since

    def replace(self) -> None:
        """Close an idle connection for the sake of a new one."""
        self.replaced = True
        self.transport.abort()

    def shutdown(self) -> None:
        """Close the connection after the request that is under way, or that has begun to come."""
        if self._busy or not self._in_head:
            super().shutdown()
        elif not (self.conn.trailing_data[0] or self._arrived):
            self.transport.close()

    def abort(self) -> None:
        """Close the connection at once."""
        self.transport.abort()

    def _end_for_room(self) -> None:
        """Close the connection, since there is no room for what its client has sent."""
        self._owner.limited(FLOOD, self.peer)
        self._arrived.clear()  # at once: the connection's end is told after other connections have read as much
        self.transport.abort()

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _take_turn(self) -> None:
        """Parse what has arrived, for about a millisecond, and count what is left."""
        begin = thread_time()
        self._parse()
        self._place.charge(thread_time() - begin)
        self._backlog.measure(len(self._arrived))

    def _parse(self) -> None:
        now = perf_counter()  # the event loop's own time stands still during a turn
        end = now + _TURN_SECONDS
        while self._arrived and self._takes and not self.transport.is_closing():
            if now > end:
                self._go_on()
                return
            if not self._busy and not self._in_head:
                self._in_head, self._since = True, self.loop.time()
            piece = bytes(self._arrived[: self._piece_bytes])
            del self._arrived[: self._piece_bytes]
            if not self._busy and self._has_too_many_lines(piece):
                self._refuse(431)
                return
            super().data_received(piece)
            before, now = now, perf_counter()
            slow = now - before > _TURN_SECONDS
            self._piece_bytes = _MIN_PIECE_BYTES if slow else min(2 * self._piece_bytes, _MAX_PIECE_BYTES)
        if self._takes and not self.transport.is_closing():
            self.flow.resume_reading()

    def _go_on(self) -> None:
        """Take a turn soon, if there is something to parse."""
        if self._arrived:
            self._place.wait()

    @property
    def _takes(self) -> bool:
        """Return True if the parser takes bytes: of a head, or of a body that its request's handler reads."""
        return not self._busy or (self.cycle.more_body and len(self.cycle.body) <= HIGH_WATER_LIMIT)

    def _has_too_many_lines(self, piece: bytes) -> bool:
        """Return True if the head that goes on in this piece has too many lines."""
        head = self.conn.trailing_data[0] + piece
        end = _HEAD_END.search(head)
        return head.count(b"\n", 0, end.start() if end else len(head)) > MAX_HEAD_LINES

    def _tell_lost(self) -> None:
        if lost := self._when_lost:
            self._when_lost = None
            lost()
