"""``python -m benchmarks.attacks.attacker NAME PORT``: run one attack in a process of its own."""

import argparse
import heapq
import json
import resource
import selectors
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from itertools import count

from benchmarks.attacks.link import Attack, Link
from benchmarks.attacks.table import ATTACKS

#: The line that a process prints once all connections have been opened.
BEGUN = "begun"
#: Pause before a connection that has ended is opened again, in seconds.
_REOPEN_SECONDS = 0.02
_TURNS_BETWEEN_READS = 50


@dataclass
class Sent:
    """The amount of an attack. opened: connections, with those that replaced ended ones. sent: bytes."""

    opened: int = 0
    sent: int = 0


class Attacker:
    """Sends an attack on several connections. A connection that ends is replaced by a new one."""

    def __init__(self, attack: Attack, port: int, connections: int) -> None:
        self.result = Sent()
        self._attack, self._port = attack, port
        self._selector = selectors.DefaultSelector()
        self._ready: deque[Link] = deque()
        #: Connections that pause, with the end of their pause. None is a place whose connection has ended.
        self._paused: list[tuple[float, int, Link | None]] = []
        self._order = count()
        for _ in range(connections):
            self._open()

    def run(self, seconds: float) -> Sent:
        """Attack for some seconds, then close all connections."""
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            while self._paused and self._paused[0][0] <= now:
                link = heapq.heappop(self._paused)[2]
                if link is None:
                    self._open()
                elif not link.closed:
                    self._ready.append(link)
            for _ in range(min(_TURNS_BETWEEN_READS, len(self._ready))):
                self._send(self._ready.popleft())
            due = self._paused[0][0] if self._paused else end
            self._wait(0.0 if self._ready else max(0.0, min(due, end) - time.monotonic()))
        for key in list(self._selector.get_map().values()):
            key.data.socket.close()
        return self.result

    def _open(self) -> None:
        link = Link(self._port, self._attack)
        self.result.opened += 1
        self._selector.register(link.socket, selectors.EVENT_WRITE, link)

    def _send(self, link: Link) -> None:
        if link.closed:
            return
        before = link.sent
        try:
            pause = link.send()
        except BlockingIOError:
            self._watch(link, selectors.EVENT_WRITE)
            return
        self.result.sent += link.sent - before
        if link.closed:
            self._ended(link)
        elif pause:
            heapq.heappush(self._paused, (time.monotonic() + pause, next(self._order), link))
        elif pause is not None:
            self._ready.append(link)

    def _wait(self, seconds: float) -> None:
        for key, events in self._selector.select(seconds):
            link: Link = key.data
            if events & selectors.EVENT_WRITE:
                self._watch(link, 0)
                self._ready.append(link)
            if events & selectors.EVENT_READ and not link.reads:
                self._watch(link, 0)
            elif events & selectors.EVENT_READ:
                link.receive()
                if link.closed:
                    self._ended(link)
                elif link.silent and link.has_replies:
                    self._ready.append(link)

    def _watch(self, link: Link, events: int) -> None:
        """Wait for these events, and for bytes to read if the script reads."""
        events |= selectors.EVENT_READ if link.reads else 0
        if link.socket in self._selector.get_map():
            self._selector.unregister(link.socket)
        if events:
            self._selector.register(link.socket, events, link)

    def _ended(self, link: Link) -> None:
        if link.socket in self._selector.get_map():
            self._selector.unregister(link.socket)
        link.socket.close()
        if link.hung_up:
            self._open()
            return
        heapq.heappush(self._paused, (time.monotonic() + _REOPEN_SECONDS, next(self._order), None))


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.attacks.attacker", description=__doc__)
    command.add_argument("name", choices=ATTACKS, help="the attack")
    command.add_argument("port", type=int, help="the server's port on 127.0.0.1")
    command.add_argument("--connections", type=int, default=1)
    command.add_argument("--seconds", type=float, default=6.0)
    options = command.parse_args(arguments)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    attack = ATTACKS[options.name]
    attacker = Attacker(attack, options.port, attack.sockets(options.connections))
    print(BEGUN, flush=True)
    print(json.dumps(asdict(attacker.run(options.seconds))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
