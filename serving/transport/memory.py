"""The memory policy of a server: the bytes of each call, its wait for its peer, and the choice of calls to evict.

Pure: the caller gives the time, and the policy calls only ``evict`` of a holder.
"""

from collections.abc import Reversible
from operator import attrgetter
from typing import Protocol

#: Seconds without progress after which a call that waits for its peer is given up.
STALL_SECONDS = 60.0


class Holder(Protocol):
    """The part of a call that the policy uses. Calls are compared by identity.

    held: the bytes that the call has in memory. waits: True if the call waits for its peer. Only Memory sets both.
    """

    held: int
    waits: bool

    @property
    def owner(self) -> "Owner":
        """Return the call's connection."""

    def evict(self, stalled: bool, /) -> None:
        """End the call, and release its bytes. stalled: True for lack of progress, False for lack of memory.

        It may wait again instead if another holder of its owner waits.
        """


class Owner(Protocol):
    """The part of a connection that the policy uses. Connections are compared by identity.

    held: the bytes of all its holders; only Memory sets it.
    """

    held: int

    @property
    def holders(self) -> Reversible[Holder]:
        """Return the holders that may be evicted while they work, in the order in which they came."""


class _Waiting:
    """The holders of one owner that wait for their peers.

    progress: the time of each holder's last progress, and the bytes it held then; oldest first. held: those bytes of
    all of them together.
    """

    __slots__ = ("held", "progress")

    def __init__(self) -> None:
        self.progress: dict[Holder, tuple[float, int]] = {}
        self.held = 0


class Memory:
    """The bytes of requests in flight and of unread answers, of all clients of a server.

    A holder that waits for its peer (with an incomplete message, or an unread answer) can be evicted. The owner with
    the most bytes of waiting holders loses one first, so that a flood on one connection does not end the slow upload on
    another. A holder that waits for the server is evicted only if no holder waits for its peer, and if its owner holds
    the most, and more than the owner that needs room.

    max_bytes: the most bytes of all holders together; only ``limit`` changes it. stall_seconds: time without progress
    after which a waiting holder is evicted even if there is room.
    """

    __slots__ = ("_owners", "_waiting", "max_bytes", "stall_seconds", "used")

    def __init__(self, max_bytes: int, stall_seconds: float = STALL_SECONDS) -> None:
        self.max_bytes = max_bytes
        self.stall_seconds = stall_seconds
        #: Bytes that are held now.
        self.used = 0
        self._owners: dict[Owner, None] = {}  # that hold anything
        self._waiting: dict[Owner, _Waiting] = {}  # by owner

    def hold(self, holder: Holder, size: int) -> None:
        """Count bytes as held, or a negative number of them as released."""
        owner = holder.owner
        if not owner.held:
            self._owners[owner] = None
        owner.held += size
        holder.held += size
        self.used += size

    def waits(self, holder: Holder, now: float) -> None:
        """Note that a holder waits for its peer, and has made progress now. now: seconds of any clock."""
        waiting = self._waiting.get(holder.owner)
        if waiting is None:
            waiting = self._waiting[holder.owner] = _Waiting()
        elif holder.waits:
            waiting.held -= waiting.progress.pop(holder)[1]
        waiting.progress[holder] = (now, holder.held)
        waiting.held += holder.held
        holder.waits = True

    def works(self, holder: Holder) -> None:
        """Note that a holder does not wait for its peer."""
        if holder.waits:
            holder.waits = False
            waiting = self._waiting[holder.owner]
            waiting.held -= waiting.progress.pop(holder)[1]
            if not waiting.progress:
                del self._waiting[holder.owner]

    def leave(self, holder: Holder) -> None:
        """Release all bytes of a holder."""
        if holder.waits:
            self.works(holder)
        owner, size = holder.owner, holder.held
        self.used -= size
        owner.held -= size
        holder.held = 0
        if not owner.held:
            self._owners.pop(owner, None)

    def any_waits(self, owner: Owner) -> bool:
        """Return True if a holder of an owner waits for its peer."""
        return owner in self._waiting

    def make_room(self, asking: Holder) -> None:
        """Evict holders until the rest fits, ``asking`` last.

        The owner with the most waiting bytes loses the holder with the oldest progress. If nothing waits, the owner
        with the most bytes loses its newest holder.
        """
        while self.used > self.max_bytes:
            victim = self._victim(asking) or asking
            self.works(victim)
            victim.evict(False)
            if victim is asking and not asking.waits:
                return

    def limit(self, max_bytes: int) -> None:
        """Change the most bytes of all holders. Holders are evicted until the rest fits, as far as that is possible."""
        self.max_bytes = max_bytes
        while self.used > self.max_bytes and (victim := self._victim(None)):
            self.works(victim)
            victim.evict(False)

    def evict_stalled(self, now: float) -> None:
        """Evict each holder that waits for its peer and has made no progress for ``stall_seconds``."""
        stalled = []
        for waiting in self._waiting.values():
            for holder, (since, _) in waiting.progress.items():
                if now - since < self.stall_seconds:
                    break
                stalled.append(holder)
        for holder in stalled:
            if holder.waits:  # otherwise another holder's end has ended it
                self.works(holder)
                holder.evict(True)

    def _victim(self, asking: Holder | None) -> Holder | None:
        if self._waiting:
            return next(iter(max(self._waiting.values(), key=_held).progress))
        # Of several with as many bytes, the last one to come goes first.
        for owner in sorted(reversed(self._owners), key=_held, reverse=True):
            if asking and owner.held <= asking.owner.held:
                return asking
            if victim := next((one for one in reversed(owner.holders) if one.held), None):
                return victim
        return asking


_held = attrgetter("held")
