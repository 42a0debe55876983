"""The memory policy, and a server's patience: who is evicted and when, without a socket or a clock."""

from asyncio import WriteTransport
from collections import defaultdict
from typing import cast

from serving.transport.connection_limits import UNREAD
from serving.transport.memory import Memory
from serving.transport.methods import Peer, TransportLimits
from serving.transport.patience import Patience
from serving.transport.streams import Streams
from serving.transport.unsent import Unsent


class Owner:
    """A connection."""

    def __init__(self) -> None:
        self.held = 0
        self.holders: list[Holder] = []


class Named(Memory):
    """A memory whose owners have names."""

    def __init__(self, max_bytes: int, stall_seconds: float = 60.0) -> None:
        super().__init__(max_bytes, stall_seconds)
        self.names: defaultdict[str, Owner] = defaultdict(Owner)


class Holder:
    """Releases all when it is evicted; evicted: whether for want of progress, or None."""

    def __init__(self, memory: Named, name: str, size: int = 0, owner: str = "a client") -> None:
        self.held = 0
        self.owner = memory.names[owner]
        self.owner.holders.append(self)
        self.waits = False
        self.name = name
        self.evicted: bool | None = None
        self._memory = memory
        memory.hold(self, size)

    def evict(self, stalled: bool) -> None:
        assert self.evicted is None, "evicted twice"
        self.evicted = stalled
        self._memory.leave(self)


def test_what_is_held_is_counted_to_the_byte() -> None:
    memory = Named(1000)
    one, other = Holder(memory, "one", 100), Holder(memory, "other", 50)
    memory.hold(one, 30)
    memory.hold(one, -10)
    assert (one.held, other.held, memory.used) == (120, 50, 170)
    memory.leave(one)
    assert (one.held, memory.used) == (0, 50)
    memory.leave(other)
    assert memory.used == 0


def test_room_is_made_by_those_that_have_waited_longest_for_their_peer() -> None:
    memory = Named(1000)
    holders = [Holder(memory, name, 300) for name in "abc"]
    for now, holder in enumerate(holders):
        memory.waits(holder, float(now))
    memory.waits(holders[0], 5.0)  # made progress meanwhile
    new = Holder(memory, "new", 500)
    memory.make_room(new)
    assert [holder.evicted for holder in holders] == [None, False, False]
    assert new.evicted is None and memory.used == 800


def test_a_flood_of_one_client_does_not_evict_the_slow_upload_of_another() -> None:
    memory = Named(1000)
    upload = Holder(memory, "upload", 400, "honest")
    memory.waits(upload, 0.0)
    flood = []
    for index in range(100):
        holder = Holder(memory, "flood", 100, "flood")
        memory.waits(holder, 1.0 + index)
        memory.make_room(holder)
        flood.append(holder)
    assert upload.evicted is None
    assert [holder.evicted for holder in flood] == [False] * 94 + [None] * 6, "the oldest go first"
    memory.leave(upload)
    assert memory.used == 600


def test_what_an_owner_holds_follows_the_progress_of_its_calls() -> None:
    memory = Named(1000)
    one = Holder(memory, "one", 100, "a")
    other = Holder(memory, "other", 300, "b")
    memory.waits(one, 0.0)
    memory.waits(other, 0.0)
    memory.hold(one, 400)
    memory.waits(one, 1.0)
    memory.make_room(Holder(memory, "new", 300, "c"))
    assert (one.evicted, other.evicted) == (False, None)
    memory.hold(other, -200)
    memory.works(other)
    memory.waits(other, 2.0)
    last = Holder(memory, "last", 200, "d")
    memory.waits(last, 3.0)
    memory.make_room(Holder(memory, "large", 500, "e"))
    assert (last.evicted, other.evicted) == (False, None)


def test_nobody_is_evicted_where_there_is_room() -> None:
    memory = Named(1000)
    holder = Holder(memory, "a", 1000)
    memory.waits(holder, 0.0)
    memory.make_room(Holder(memory, "new"))
    assert holder.evicted is None


def test_who_works_is_not_evicted_and_who_asks_goes_last() -> None:
    memory = Named(1000)
    working = Holder(memory, "working", 900)
    memory.waits(working, 0.0)
    memory.works(working)
    waiting = Holder(memory, "waiting", 50)
    memory.waits(waiting, 1.0)
    new = Holder(memory, "new", 200)
    memory.make_room(new)
    assert (working.evicted, waiting.evicted, new.evicted) == (None, False, False)
    assert memory.used == 900


def test_who_works_gives_way_to_an_owner_that_holds_less_if_nobody_waits() -> None:
    memory = Named(1000)
    first, second = (Holder(memory, name, 400, "much") for name in ("first", "second"))
    other = Holder(memory, "other", 150, "some")
    few = Holder(memory, "few", 100, "few")
    memory.make_room(few)
    assert [one.evicted for one in (first, second, other, few)] == [None, False, None, None], "the newest goes"
    more = Holder(memory, "more", 500, "few")
    memory.make_room(more)
    assert [one.evicted for one in (first, other, few, more)] == [None, None, None, False], "it holds the most itself"


def test_a_lower_limit_ends_those_who_wait_and_then_those_who_work_for_the_largest_owners() -> None:
    memory = Named(1000)
    waiting = Holder(memory, "waiting", 100, "some")
    memory.waits(waiting, 0.0)
    first, second = (Holder(memory, name, 300, name) for name in ("first", "second"))
    few, unevictable = Holder(memory, "few", 50, "few"), Holder(memory, "unevictable", 200, "whole")
    unevictable.owner.holders.clear()
    memory.limit(900)
    assert [one.evicted for one in (waiting, first, second, few)] == [False, None, None, None]
    memory.limit(600)
    assert [one.evicted for one in (first, second, few)] == [None, False, None], "of equal ones the last goes"
    memory.limit(10)
    assert (first.evicted, few.evicted, memory.used) == (False, False, 200), "as far as that is possible"
    memory.limit(1000)
    memory.make_room(new := Holder(memory, "new", 700, "new"))
    assert (new.evicted, memory.used) == (None, 900)


def test_who_asks_may_be_who_has_waited_longest() -> None:
    memory = Named(1000)
    new, other = Holder(memory, "new", 600), Holder(memory, "other", 600)
    memory.waits(new, 0.0)
    memory.waits(other, 1.0)
    memory.make_room(new)
    assert (new.evicted, other.evicted) == (False, None)


def test_who_makes_no_progress_for_a_time_is_evicted_even_where_there_is_room() -> None:
    memory = Named(1000, stall_seconds=60)
    stalled, alive, working = (Holder(memory, name, 10) for name in ("stalled", "alive", "working"))
    for holder in (stalled, alive, working):
        memory.waits(holder, 0.0)
    memory.waits(alive, 30.0)
    memory.works(working)
    memory.evict_stalled(59.0)
    assert memory.used == 30
    memory.evict_stalled(60.0)
    assert (stalled.evicted, alive.evicted, working.evicted) == (True, None, None)
    memory.evict_stalled(90.0)
    assert alive.evicted is True
    assert memory.used == 10


def test_who_has_left_is_not_evicted_and_may_end_others() -> None:
    memory = Named(1000, stall_seconds=1)
    first, second = Holder(memory, "first", 10), Holder(memory, "second", 10)
    memory.waits(first, 0.0)
    memory.waits(second, 0.0)
    evict = first.evict

    def both(stalled: bool) -> None:
        evict(stalled)
        memory.leave(second)

    first.evict = both  # type: ignore[method-assign]
    memory.evict_stalled(10.0)
    assert (first.evicted, second.evicted, memory.used) == (True, None, 0)


class FakeSocket:
    """Has a number of bytes in its buffer."""

    def __init__(self) -> None:
        self.size = 0
        self.aborted = False

    def get_write_buffer_size(self) -> int:
        return self.size

    def abort(self) -> None:
        self.aborted = True


class FakeStreams:
    held = 0
    holders = ()

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.limited: list[str] = []
        self.limits = TransportLimits(1000, "", 1000, "", limited=self.limited.append)
        self.client = Peer("10.0.0.1")
        self.now = 0.0
        self.loop = self

    def time(self) -> float:
        return self.now


def test_bytes_that_a_clients_system_does_not_take_count_until_it_takes_them() -> None:
    memory, socket = Named(1000, stall_seconds=60), FakeSocket()
    streams = FakeStreams(memory)
    unsent = Unsent(cast(Streams, streams), cast(WriteTransport, socket))
    for size in (300, 500, 200, 0, 0, 100):
        socket.size = size
        unsent.measure()
        assert memory.used == size
    streams.now = 30.0
    socket.size = 90
    unsent.measure()
    memory.evict_stalled(61.0)
    assert not socket.aborted and memory.used == 90
    socket.size = 80
    memory.evict_stalled(90.0)
    assert not socket.aborted and memory.used == 80, "it takes them slowly"
    memory.evict_stalled(100.0)
    assert socket.aborted and memory.used == 0 and streams.limited == [UNREAD]


def test_unsent_bytes_give_way_to_others() -> None:
    memory, socket = Named(1000), FakeSocket()
    unsent = Unsent(cast(Streams, FakeStreams(memory)), cast(WriteTransport, socket))
    socket.size = 900
    unsent.measure()
    socket.size = 700
    memory.make_room(Holder(memory, "new", 300))
    assert not socket.aborted and memory.used == 1000
    memory.make_room(Holder(memory, "new", 1))
    assert socket.aborted and memory.used == 301


def test_patience_ends_with_a_burst_and_comes_back_with_time() -> None:
    patience = Patience(burst=200, per_second=33, now=0.0)
    assert all(patience.spend(1, 0.0) for _ in range(200))
    assert not patience.spend(1, 0.0)
    patience = Patience(burst=200, per_second=33, now=0.0)
    # What comes no faster than it fills never ends it, however long.
    assert all(patience.spend(1, index / 33) for index in range(10_000))


def test_patience_is_earned_but_not_saved_up() -> None:
    patience = Patience(burst=10, per_second=1, now=0.0)
    patience.earn(1000)
    assert all(patience.spend(1, 0.0) for _ in range(10)) and not patience.spend(1, 0.0)
    patience.earn(5)
    assert patience.spend(4, 0.0) and not patience.spend(4, 0.0)
