"""The memory policy in any order of events: the count of what is held, the limit, and the choice of who is evicted."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.transport.memory import Memory
from tests.machines import search

MAX_BYTES, STALL_SECONDS = 1000, 60.0
SIZES = st.sampled_from((0, 1, 10, 100, 300, 600, 1000, 2500))


class Owner:
    """A connection."""

    def __init__(self) -> None:
        self.held = 0
        self.holders: list[Holder] = []


class Holder:
    """A call or a connection that holds bytes. slow: it has released bytes unseen, so its first eviction spares it."""

    def __init__(self, machine: "Policy", owner: Owner, slow: bool) -> None:
        self.held = 0
        self.waits = False
        self.owner = owner
        self.slow = slow
        self.waited = False  # until it works or is evicted
        self.since = 0.0
        self.waiting_bytes = 0
        self.evicted: bool | None = None
        self._machine = machine
        owner.holders.append(self)

    def evict(self, stalled: bool) -> None:
        """Leave, or release half of the bytes and wait again."""
        assert self.evicted is None and not self.waits
        memory = self._machine.memory
        self._machine.check_choice(self, stalled)
        self.waited = False
        if self.slow and self is not self._machine.asking:  # who asks has just been measured
            self.slow = False
            memory.hold(self, -(self.held // 2))
            self._machine.wait(self)
        else:
            self.evicted = stalled
            memory.leave(self)
            self._machine.remove(self)


class Policy(RuleBasedStateMachine):
    """Holders of three owners, whose events come in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory(MAX_BYTES, STALL_SECONDS)
        self.owners = {name: Owner() for name in "abc"}
        self.holders: list[Holder] = []
        self.now = 0.0
        self.asking: Holder | None = None

    def wait(self, holder: Holder) -> None:
        self.memory.waits(holder, self.now)
        holder.waited, holder.since, holder.waiting_bytes = True, self.now, holder.held

    def check_choice(self, victim: Holder, stalled: bool) -> None:
        """Check that a victim is the one that the policy names."""
        if stalled:
            assert self.now - victim.since >= STALL_SECONDS
            return
        assert self.memory.used > MAX_BYTES, "there was room"
        waiting = [one for one in self.holders if one.waited]
        if not waiting:
            self.check_working_choice(victim)
            return
        by_owner: dict[Owner, int] = {}
        for one in waiting:
            by_owner[one.owner] = by_owner.get(one.owner, 0) + one.waiting_bytes
        assert victim in waiting
        assert by_owner[victim.owner] == max(by_owner.values())
        assert victim.since == min(one.since for one in waiting if one.owner is victim.owner)

    def check_working_choice(self, victim: Holder) -> None:
        """Check the choice of a victim while nobody waits for its peer."""
        assert self.asking
        held = {owner: sum(one.held for one in self.holders if one.owner is owner) for owner in self.owners.values()}
        assert held[victim.owner] == max(held.values())
        if victim is not self.asking:
            assert held[victim.owner] > held[self.asking.owner]
            assert victim is [one for one in self.holders if one.owner is victim.owner and one.held][-1]

    @rule(owner=st.sampled_from("abc"), size=SIZES, slow=st.booleans(), waits=st.booleans())
    def come(self, owner: str, size: int, slow: bool, waits: bool) -> None:
        holder = Holder(self, self.owners[owner], slow)
        self.holders.append(holder)
        self.grow_by(holder, size, waits)

    @precondition(lambda self: self.holders)
    @rule(choice=st.integers(0, 50), size=SIZES, waits=st.booleans())
    def grow(self, choice: int, size: int, waits: bool) -> None:
        self.grow_by(self.chosen(choice), size, waits)

    def grow_by(self, holder: Holder, size: int, waits: bool) -> None:
        """Hold more bytes, and make room for them, as calls do."""
        self.memory.hold(holder, size)
        assert self.memory.used <= MAX_BYTES + size, "never more than the limit and one message"
        if waits:
            self.wait(holder)
        if self.memory.used > MAX_BYTES:
            self.asking = holder
            self.memory.make_room(holder)
            self.asking = None

    @precondition(lambda self: self.holders)
    @rule(choice=st.integers(0, 50), share=st.integers(0, 4))
    def release(self, choice: int, share: int) -> None:
        holder = self.chosen(choice)
        self.memory.hold(holder, -(holder.held * share // 4))

    @precondition(lambda self: self.holders)
    @rule(choice=st.integers(0, 50))
    def make_progress(self, choice: int) -> None:
        self.wait(self.chosen(choice))

    @precondition(lambda self: self.holders)
    @rule(choice=st.integers(0, 50))
    def come_in_full(self, choice: int) -> None:
        holder = self.chosen(choice)
        self.memory.works(holder)
        holder.waited = False

    @precondition(lambda self: self.holders)
    @rule(choice=st.integers(0, 50))
    def end(self, choice: int) -> None:
        holder = self.chosen(choice)
        self.memory.leave(holder)
        self.remove(holder)

    @rule(seconds=st.sampled_from((0.0, 1.0, 20.0, 59.0, 60.0)))
    def look_around(self, seconds: float) -> None:
        self.now += seconds
        self.memory.evict_stalled(self.now)
        assert all(self.now - one.since < STALL_SECONDS for one in self.holders if one.waits)

    @invariant()
    def what_is_held_is_counted_and_within_the_limit(self) -> None:
        assert all(one.held >= 0 for one in self.holders)
        assert self.memory.used == sum(one.held for one in self.holders) <= MAX_BYTES

    def remove(self, holder: Holder) -> None:
        self.holders.remove(holder)
        holder.owner.holders.remove(holder)

    def chosen(self, choice: int) -> Holder:
        return self.holders[choice % len(self.holders)]

    def teardown(self) -> None:
        for holder in list(self.holders):
            self.memory.leave(holder)
        assert self.memory.used == 0
        assert not (self.memory._owners or self.memory._waiting), "a holder that has left is remembered"
        assert not any(owner.held for owner in self.owners.values())


def test_no_order_of_events_breaks_the_memory_policy() -> None:
    search(Policy, examples=60)
