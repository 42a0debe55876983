"""The memory policy of a server: who holds bytes, who waits for its peer since when, and who is evicted.

Pure: it is told the time and calls nothing but ``evict`` of a holder.
"""

from typing import Protocol

#: Seconds without progress after which a call that waits for its peer is given up.
STALL_SECONDS = 60.0


class Holder(Protocol):
    """A call, as the policy sees it. Compared by identity.

    held: bytes that it has in memory. waits: whether they wait for the peer; both are set by Memory alone.
    """

    held: int
    waits: bool

    def evict(self, stalled: bool, /) -> None:
        """End, and release all that is held. stalled: for want of progress, not for want of memory."""


class Memory:
    """Bytes of requests under way and of answers that their clients do not take, of all clients of a server.

    A holder that waits for its peer (with half a message, or with an answer that is not read) can be evicted. One that
    waits for the server cannot, since what is wrong is not the client's doing.
    max_bytes: bytes that all may hold together. stall_seconds: time without progress after which who waits is evicted
    even where there is room.
    """

    __slots__ = ("_progress", "max_bytes", "stall_seconds", "used")

    def __init__(self, max_bytes: int, stall_seconds: float = STALL_SECONDS) -> None:
        self.max_bytes = max_bytes
        self.stall_seconds = stall_seconds
        #: Bytes that are held now.
        self.used = 0
        # Who waits for its peer, and when it last made progress; the oldest progress first.
        self._progress: dict[Holder, float] = {}

    def hold(self, holder: Holder, size: int) -> None:
        """Count bytes as held, or a negative number of them as released."""
        holder.held += size
        self.used += size

    def waits(self, holder: Holder, now: float) -> None:
        """Note that a holder waits for its peer, and has made progress now, in seconds of any clock."""
        self._progress.pop(holder, None)
        self._progress[holder] = now
        holder.waits = True

    def works(self, holder: Holder) -> None:
        """Note that a holder does not wait for its peer."""
        if holder.waits:
            holder.waits = False
            del self._progress[holder]

    def leave(self, holder: Holder) -> None:
        """Release all that a holder has."""
        if holder.waits:
            self.works(holder)
        self.used -= holder.held
        holder.held = 0

    def make_room(self, asking: Holder) -> None:
        """Evict until what is held fits: the longest without progress first, and in the end who asks."""
        while self.used > self.max_bytes:
            victim = next(iter(self._progress), asking)
            self.works(victim)
            victim.evict(False)
            if victim is asking:
                return

    def evict_stalled(self, now: float) -> None:
        """Evict each holder that waits for its peer and has made no progress for ``stall_seconds``."""
        stalled = []
        for holder, since in self._progress.items():
            if now - since < self.stall_seconds:
                break
            stalled.append(holder)
        for holder in stalled:
            if holder.waits:  # else the end of another has ended it
                self.works(holder)
                holder.evict(True)
