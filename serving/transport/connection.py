"""One client's connection: the socket and the timers around reader and writer (RFC 9113)."""

import asyncio
import logging
import random
import socket
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import cast

import grpc

from serving.transport import frames
from serving.transport.backlog import Backlog
from serving.transport.connection_limits import FLOOD, IDLE, REPLACED, UNREAD, Idleness, note_limit
from serving.transport.control_frames import DRAIN_PING
from serving.transport.frame_reader import FrameReader, NotHttp2
from serving.transport.frames import ConnectionFault, ErrorCode
from serving.transport.methods import client_of, peer_of
from serving.transport.receiving import MAX_BYTES_A_TURN
from serving.transport.records import records_of
from serving.transport.sending import Buffers
from serving.transport.streams import ConnectionState, OpenCall, Streams
from serving.transport.terms import Terms
from serving.transport.unsent import Unsent

_HANDSHAKE_SECONDS = 20.0
# A client whose step could not be divided, such as a large header block, waits as many times as long as others have.
_PAUSE = 3
_STALL_SECONDS = 60.0  # a client whose system takes no bytes for this time is cut off
_PING_SECONDS = 2.0
_MAX_BUFFERED_BYTES = 2**18  # above this, the client is not read from and its streams wait
_CLOSE_SECONDS = 5.0  # for the last bytes to leave
# Seconds of silence before the first probe, and between probes; and how many may stay unanswered.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 20, "TCP_KEEPCNT": 3}

# It announces a drain. Calls on their way are accepted: the answer of the ping shows which one is the last.
_DRAIN = frames.go_away(frames.MAX_STREAM, ErrorCode.NO_ERROR) + frames.frame(frames.PING, 0, 0, DRAIN_PING)

_logger = logging.getLogger(__name__)


class Connection(asyncio.Protocol):
    """The socket of a client. It passes bytes to the reader, and joins the writes of a turn of the event loop."""

    #: The open calls by stream.
    calls: Mapping[int, OpenCall] = MappingProxyType({})
    #: The owner of what it holds, once it is made.
    owner: Streams | None = None

    def __init__(self, terms: "Terms[Connection]", loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        #: Done once the client knows the last call that will be answered, or has gone.
        self.told: asyncio.Future[None] = loop.create_future()
        self._terms = terms
        self._out: Buffers = []
        self._draining = self._refused = False
        self._timers: list[asyncio.TimerHandle] = []
        self._stall: asyncio.TimerHandle | None = None
        self.replaced = False  # for a new one

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's class does not declare it
        peer = peer_of(self._transport.get_extra_info("peername"), self._transport.get_extra_info("peercert"))
        if not self._terms.opened(self, peer.address):
            self._refused = True
            self._transport.abort()
            return
        #: The client's address, and the client that it stands for.
        self.address, self.client = peer.address, client_of(peer.address)
        terms = self._terms
        self._reader = FrameReader(self, terms.find, terms)
        self._streams = self.owner = self._reader.streams
        self.calls = self._streams.calls
        self._streams.client = peer
        self._idleness = Idleness(self._streams, self.loop.time())
        self._transport.set_write_buffer_limits(_MAX_BUFFERED_BYTES)
        self._unsent = Unsent(self._streams, self._transport)
        self._backlog = Backlog(terms.memory, self._streams, partial(_end_for_room, self))
        self.records = records_of(self._transport)
        _keep_alive(self._transport)
        self._timers.append(self.loop.call_later(_HANDSHAKE_SECONDS, self._check_settled))
        if self._terms.age:  # spread, so that clients that came together do not return together
            age = self._terms.age * random.uniform(0.9, 1.1)
            self._timers.append(self.loop.call_later(age, self.drain, self._terms.grace))

    def connection_lost(self, error: Exception | None) -> None:
        if self._refused:
            return
        for timer in self._timers:
            timer.cancel()
        if self._stall:
            self._stall.cancel()
        self._end_calls()
        self._reader.leave()
        self._unsent.gone()
        self._backlog.gone()
        self._terms.lost(self)
        # Without cycles this object goes at once, and with it uvloop's transport, which has 256 KiB for TLS.
        self._streams.leave()
        self._out = []
        del self._reader, self._unsent, self._backlog, self._transport

    def pause_writing(self) -> None:
        # Requests that are not read need no answers, so a client that only sends cannot fill the memory.
        self._streams.paused = True
        self._unsent.measure()  # which may end this connection, and then tells that its client does not read
        self._transport.pause_reading()
        self._stall = self.loop.call_later(_STALL_SECONDS, self._unsent.evict, True)

    def resume_writing(self) -> None:
        self._unsent.measure()
        self._streams.paused = False
        if self._stall:
            self._stall.cancel()
        if self._reader.unread:
            self._streams.place.wait()
        elif not self._closed:
            self._transport.resume_reading()
        self._wake_writers()

    def data_received(self, data: bytes) -> None:
        if self._refused or self._closed:
            return
        if self.records and self.records.are_tiny(len(data)):
            note_limit(FLOOD, self._terms.limits, self._streams.client)
            self._transport.abort()  # at once: until TLS's own end, its records would be read
            return
        if not self._reader.unread:
            self._reader.take_turn(self.loop.time())
        self._read(data)

    def _read(self, data: bytes) -> None:
        """Read what has come, as far as the turn allows."""
        reader, state = self._reader, self._streams.state
        before = reader.clock.taken
        try:
            try:
                reader.receive(data)
            finally:
                self._streams.place.charge(reader.clock.taken - before)
            if reader.unread:
                self._transport.pause_reading()
                self._streams.place.wait(_PAUSE * reader.clock.overdraft)
                self._backlog.measure(reader.unread_bytes)
            elif self._backlog.held:
                self._backlog.measure(0)
            if self._draining and state is not self._streams.state is ConnectionState.OPEN:
                self.send(_DRAIN)
        except ConnectionFault as fault:
            self._fail(fault.code, str(fault))
        except NotHttp2 as other:
            self._refuse(other.answer)
        except Exception:  # after a fault of this server, no task would read the connection
            _logger.exception("a connection failed")
            self._fail(ErrorCode.INTERNAL_ERROR, "")

    def read_on(self) -> None:
        """Read the bytes that were left for this round, unless the client must read answers first."""
        if not self._closed and self._reader.unread and not self._streams.paused:
            self._reader.begin_turn()
            self._read(b"")
            if not self._reader.unread and not self._streams.paused and not self._closed:
                self._transport.resume_reading()

    def send(self, data: bytes) -> None:
        """Send data together with the other data of this turn of the event loop."""
        if not self._out:
            self.loop.call_soon(self._flush)
        self._out.append(data)

    def send_all(self, buffers: Buffers) -> None:
        """Send several buffers in their order."""
        if not self._out:
            self.loop.call_soon(self._flush)
        self._out += buffers

    def drain(self, grace: float) -> None:
        """Refuse new calls, and close when the open ones have ended, at the latest after ``grace`` seconds."""
        if self._closed or self._draining:
            return
        self._draining = True
        self._timers.append(self.loop.call_later(_PING_SECONDS, self.drained))
        self._timers.append(self.loop.call_later(grace, self.cut_off))
        if self._streams.state is ConnectionState.OPEN:
            self.send(_DRAIN)

    def drained(self) -> None:
        """Tell the client the last call that will be answered. It may send later calls elsewhere."""
        if not self._draining or self._closed or self._streams.state is ConnectionState.GOING_AWAY:
            return
        if self._streams.state is not ConnectionState.PREFACE:  # before the preface no frame may be sent
            self._streams.go_away(ErrorCode.NO_ERROR)
        _set_done(self.told)
        if not self._streams.calls:
            self._close()

    def all_over(self) -> None:
        """Close after the last call has ended."""
        self._close()

    def check(self, now: float) -> None:
        """End the connection if its client makes no calls, or does not end its headers. now: of the event loop."""
        if self._closed:
            return
        try:
            self._reader.check_headers(now)
        except ConnectionFault as fault:
            self._fail(fault.code, str(fault))
        idle = self._idleness.look(now)
        if 0 < self._terms.limits.idle_seconds <= idle and not (self._draining or self._closed):
            self._terms.limits.limited(IDLE)
            self.drain(max(_PING_SECONDS, self._terms.grace))  # calls that are on their way get time

    def idle_seconds(self, now: float) -> float:
        """Return the seconds without calls, as far as ``check`` has seen; 0 if there are calls or a drain."""
        return 0.0 if self._draining or self._closed else self._idleness.seconds(now)

    def replace(self) -> None:
        """End the connection for the sake of a new one."""
        self.replaced = True
        note_limit(REPLACED, self._terms.limits, self._streams.client)
        self.drain(max(_PING_SECONDS, self._terms.grace))  # calls that are on their way get time

    def cut_off(self) -> None:
        """End the open calls, and close."""
        for call in self._streams:
            call.refuse(grpc.StatusCode.UNAVAILABLE, "the server has stopped")
        if self._streams.state in (ConnectionState.SETTINGS, ConnectionState.OPEN):
            self._streams.go_away(ErrorCode.NO_ERROR)
        self._close()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    @property
    def _closed(self) -> bool:
        return self._streams.state is ConnectionState.CLOSED

    def _flush(self) -> None:
        data, self._out = b"".join(self._out), []
        sent, self._streams.sent_this_turn = self._streams.sent_this_turn, 0
        if not data or self._transport.is_closing():  # without data, the connection was lost
            return
        self._unsent.measure()
        if self._transport.is_closing():  # ended for want of room
            return
        self._transport.write(data)
        self._streams.sent_bytes += len(data)
        if sent > MAX_BYTES_A_TURN and not self._streams.paused:
            self._wake_writers()

    def _wake_writers(self) -> None:
        for call in self._streams:
            call.wake_writer()

    def _check_settled(self) -> None:
        if self._streams.state is ConnectionState.PREFACE:
            self._close()
        elif self._streams.state is ConnectionState.SETTINGS:
            self._fail(ErrorCode.SETTINGS_TIMEOUT, "no settings")

    def _refuse(self, answer: bytes) -> None:
        """Answer a client of another protocol."""
        self._terms.limits.dropped("a connection is closed: it does not speak HTTP/2", self._streams.client)
        if not answer:
            self._transport.abort()
            return
        self.send(answer)
        self._close()

    def _fail(self, code: ErrorCode, text: str) -> None:
        self._terms.limits.dropped(f"a connection is closed: {code.name}, {text or 'a fault'}", self._streams.client)
        if code is ErrorCode.ENHANCE_YOUR_CALM:
            self._terms.limits.limited(FLOOD)
        self._streams.go_away(code, text)
        self._close()

    def _end_calls(self) -> None:
        self._streams.state = ConnectionState.CLOSED
        for call in self._streams:
            call.abandon()
        _set_done(self.told)

    def _close(self) -> None:
        """Close when all waiting data was sent."""
        if self._closed:
            return
        self._end_calls()
        self._timers.append(self.loop.call_later(_CLOSE_SECONDS, self._transport.abort))
        self.loop.call_soon(self._transport.close)  # after _flush, which is scheduled already


def _end_for_room(connection: Connection) -> None:
    """End a connection, since there is no room for what its client has sent."""
    streams = connection._streams
    if not connection._transport.is_closing():  # otherwise its unread answers have ended it
        note_limit(UNREAD if streams.paused else FLOOD, connection._terms.limits, streams.client)
    connection._reader.forget_unread()  # at once: the connection's end is told after others have read as much
    connection.abort()


def _set_done(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _keep_alive(transport: asyncio.Transport) -> None:
    """Let the system detect a client that has gone silently."""
    link = transport.get_extra_info("socket")
    if link is None or link.family not in (socket.AF_INET, socket.AF_INET6):
        return
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if option := getattr(socket, name, None):  # not on every system
            link.setsockopt(socket.IPPROTO_TCP, option, value)
