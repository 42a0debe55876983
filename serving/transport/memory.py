"""The memory policy of a server: the bytes of each call, its wait for its peer, and the choice of calls to evict.

Pure: the caller gives the time, and the policy calls only ``evict`` of a holder.
"""

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
    def owner(self) -> object:
        """Return the call's connection. Connections are compared by identity."""

    def evict(self, stalled: bool, /) -> None:
        """End the call, and release its bytes. stalled: True for lack of progress, False for lack of memory."""


class _Owned:
    """The holders of one owner.

    holders: all of them, in the order in which they came. held: their bytes. progress: of those that wait for their
    peers, the time of the last progress, and the bytes they held then; oldest first. waiting: those bytes together.
    """

    __slots__ = ("held", "holders", "progress", "waiting")

    def __init__(self) -> None:
        self.holders: dict[Holder, None] = {}
        self.held = 0
        self.progress: dict[Holder, tuple[float, int]] = {}
        self.waiting = 0


class Memory:
    """The bytes of requests in flight and of unread answers, of all clients of a server.

    A holder that waits for its peer (with an incomplete message, or an unread answer) can be evicted. The owner with
    the most bytes of waiting holders loses one first, so that a flood on one connection does not end the slow upload on
    another. A holder that waits for the server is evicted only if no holder waits for its peer, and if its owner holds
    the most, and more than the owner that needs room.

    max_bytes: the most bytes of all holders together. stall_seconds: time without progress after which a waiting holder
    is evicted even if there is room.
    """

    __slots__ = ("_owners", "max_bytes", "stall_seconds", "used")

    def __init__(self, max_bytes: int, stall_seconds: float = STALL_SECONDS) -> None:
        self.max_bytes = max_bytes
        self.stall_seconds = stall_seconds
        #: Bytes that are held now.
        self.used = 0
        self._owners: dict[object, _Owned] = {}

    def hold(self, holder: Holder, size: int) -> None:
        """Count bytes as held, or a negative number of them as released."""
        owned = self._owned(holder)
        owned.held += size
        holder.held += size
        self.used += size

    def waits(self, holder: Holder, now: float) -> None:
        """Note that a holder waits for its peer, and has made progress now. now: seconds of any clock."""
        owned = self._owned(holder)
        if holder.waits:
            owned.waiting -= owned.progress.pop(holder)[1]
        owned.progress[holder] = (now, holder.held)
        owned.waiting += holder.held
        holder.waits = True

    def works(self, holder: Holder) -> None:
        """Note that a holder does not wait for its peer."""
        if holder.waits:
            holder.waits = False
            owned = self._owners[holder.owner]
            owned.waiting -= owned.progress.pop(holder)[1]

    def leave(self, holder: Holder) -> None:
        """Release all bytes of a holder."""
        owned = self._owners.get(holder.owner)
        if owned is None or holder not in owned.holders:
            return
        self.works(holder)
        self.used -= holder.held
        owned.held -= holder.held
        holder.held = 0
        del owned.holders[holder]
        if not owned.holders:
            del self._owners[holder.owner]

    def make_room(self, asking: Holder) -> None:
        """Evict holders until the rest fits, ``asking`` last.

        The owner with the most waiting bytes loses the holder with the oldest progress. If nothing waits, the owner
        with the most bytes loses its newest holder.
        """
        while self.used > self.max_bytes:
            victim = self._victim(asking)
            self.works(victim)
            victim.evict(False)
            if victim is asking:
                return

    def evict_stalled(self, now: float) -> None:
        """Evict each holder that waits for its peer and has made no progress for ``stall_seconds``."""
        stalled = []
        for owned in self._owners.values():
            for holder, (since, _) in owned.progress.items():
                if now - since < self.stall_seconds:
                    break
                stalled.append(holder)
        for holder in stalled:
            if holder.waits:  # otherwise another holder's end has ended it
                self.works(holder)
                holder.evict(True)

    def _owned(self, holder: Holder) -> _Owned:
        """Return the holders of a holder's owner, of which it is one."""
        owned = self._owners.get(holder.owner)
        if owned is None:
            owned = self._owners[holder.owner] = _Owned()
        owned.holders[holder] = None
        return owned

    def _victim(self, asking: Holder) -> Holder:
        if waiting := [owned for owned in self._owners.values() if owned.progress]:
            return next(iter(max(waiting, key=attrgetter("waiting")).progress))
        largest = max(self._owners.values(), key=attrgetter("held"))
        if largest.held <= self._owned(asking).held:
            return asking
        return next(one for one in reversed(largest.holders) if one.held)
