"""A connection of HTTP/1.1: uvicorn's protocol, with the limits of this server."""

import asyncio
import sys
from collections.abc import Callable
from typing import Protocol

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from serving.transport.connection_limits import IDLE, UNREAD
from serving.transport.frame_reader import HEADER_SECONDS
from serving.transport.memory import STALL_SECONDS
from serving.transport.methods import Peer, client_of, peer_of
from serving.web.problems import PROBLEM, Problem

#: The most bytes of a request's line and headers.
MAX_HEAD_BYTES = 16384
#: Seconds without a request after which a connection is closed.
KEEP_ALIVE_SECONDS = 75.0


class Owner(Protocol):
    """The server of a connection."""

    def opened(self, connection: "WebConnection", /) -> bool:
        """Count a connection. Return False if a limit refuses it."""

    def lost(self, connection: "WebConnection", /) -> None:
        """Note the end of a counted connection."""

    def malformed(self, status: int, peer: Peer, /) -> None:
        """Count and log a request that is no HTTP/1.1."""

    def limited(self, limit: str, peer: Peer, /) -> None:
        """Count and log that a limit has ended a connection."""


class WebConnection(H11Protocol):
    """A connection, between uvicorn's parser and its application."""

    def __init__(self, config: Config, state: ServerState, owner: Owner) -> None:
        super().__init__(config, state, {}, asyncio.get_running_loop())
        self._owner = owner
        self.peer = Peer("")
        self.client_key = ""
        #: True if the connection ends for the sake of a new one.
        self.replaced = False
        self._counted = False
        self._when_lost: Callable[[], object] | None = None
        self._in_head = True  # since a connection must begin with a request
        self._since = 0.0  # of the present head, or of the end of the last request
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
        self.app_state = {"connection": self}

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._counted:
            return
        self._owner.lost(self)
        super().connection_lost(exc)
        self._tell_lost()
        self.app_state = {}

    def data_received(self, data: bytes) -> None:
        if not self._busy and not self._in_head:
            self._in_head, self._since = True, self.loop.time()
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        self._in_head = bool(self.conn.trailing_data[0])
        super().on_response_complete()

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
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._owner.malformed(status, self.peer)
        if self.cycle and not self.cycle.response_complete:  # the end of a body whose request is being handled
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._tell_lost()
        if self.conn.our_state is not h11.IDLE:
            self.transport.abort()
            return
        text = (
            "this is no request of HTTP/1.1 with at most " + f"{MAX_HEAD_BYTES} bytes of headers; gRPC has its own port"
        )
        body = Problem(status, text).body()
        headers = [("content-type", PROBLEM), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            if sent := self.conn.send(event):
                self.transport.write(sent)
        self.transport.close()

    def check(self, now: float) -> None:
        """Close the connection if its client does not bring it further."""
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
        elif not self.conn.trailing_data[0]:
            self.transport.close()

    def abort(self) -> None:
        """Close the connection at once."""
        self.transport.abort()

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _tell_lost(self) -> None:
        if lost := self._when_lost:
            self._when_lost = None
            lost()
