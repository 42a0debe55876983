"""A listening socket whose connections are accepted a few at a time.

uvloop's own servers accept all that wait in one turn of the event loop, and a thousand connections take 100 ms.
"""

import asyncio
import socket
from collections.abc import Callable
from functools import partial

from serving.transport.methods import Peer, peer_of

_MAX_ACCEPTED_A_TURN = 4  # after which other connections have their turn
_BACK_OFF_SECONDS = 0.1  # until the next attempt if no file can be opened


class Listener:
    """A listening socket of a server, and the connections that are not made yet.

    connect: makes the protocol of a client. refuses: called with each client's address; returns True if its connection
    is closed at once.
    """

    def __init__(
        self, listening: socket.socket, connect: Callable[[], asyncio.Protocol], refuses: Callable[[str], bool]
    ) -> None:
        self._socket = listening
        self._connect = connect
        self._refuses = refuses
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._under_way: dict[asyncio.Task[None], Peer] = {}  # their clients, oldest first

    def start_serving(self) -> None:
        """Start to accept connections."""
        self._loop.add_reader(self._socket.fileno(), self._accept)

    def close(self) -> None:
        """Close the socket, and give up the connections that are not made yet."""
        if self._pause:
            self._pause.cancel()
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        for task in list(self._under_way):
            task.cancel()

    def _accept(self) -> None:
        for _ in range(_MAX_ACCEPTED_A_TURN):
            try:
                accepted, address = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no file can be opened; the socket would stay readable
                self._loop.remove_reader(self._socket.fileno())
                self._pause = self._loop.call_later(_BACK_OFF_SECONDS, self.start_serving)
                return
            client = peer_of(address, None)
            if self._refuses(client.address):
                accepted.close()
                continue
            accepted.setblocking(False)
            self._begin(accepted, client)

    def _begin(self, accepted: socket.socket, client: Peer) -> None:
        """Make a connection."""
        task = self._loop.create_task(self._make(accepted, client))
        self._under_way[task] = client
        task.add_done_callback(partial(self._ended, accepted))

    async def _make(self, accepted: socket.socket, client: Peer) -> None:
        await self._loop.connect_accepted_socket(self._connect, accepted)

    def _ended(self, accepted: socket.socket, task: "asyncio.Task[None]") -> None:
        self._under_way.pop(task, None)
        if task.cancelled():  # perhaps before it could begin
            accepted.close()
