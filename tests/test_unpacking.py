"""The pool of threads that inflate large messages, without a socket: turns of the connections, and jobs given up."""

import asyncio
import threading
import zlib

from serving.transport.messages import Inflation
from serving.transport.unpacking import Job, Unpacker

MESSAGE = zlib.compress(bytes(300_000))


class Blocked(Inflation):
    """An inflation that waits until it may go on."""

    def __init__(self) -> None:
        super().__init__(MESSAGE, "deflate", 2**20)
        self.go_on = threading.Event()

    def rest(self) -> bytes | None:
        self.go_on.wait(20)
        return super().rest()


def new_job(name: str, began: list[str], inflation: Inflation | None = None) -> tuple[Job, "asyncio.Future[bytes]"]:
    ended: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def done(rest: "asyncio.Future[bytes | None]") -> None:
        result = rest.result()
        assert result is not None
        ended.set_result(result)

    inflation = inflation or Inflation(MESSAGE, "deflate", 2**20)
    return Job(inflation, lambda: began.append(name), done), ended


def test_connections_get_the_thread_in_turn() -> None:
    async def main() -> None:
        unpacker, began = Unpacker(1), list[str]()
        blocked = Blocked()
        first, ended = new_job("first", began, blocked)
        unpacker.unpack("flood", first)
        jobs = [new_job(f"flood {index}", began) for index in range(3)]
        for job, _ in jobs:
            unpacker.unpack("flood", job)
        honest, answered = new_job("honest", began)
        unpacker.unpack("other", honest)
        assert began == ["first"]
        blocked.go_on.set()
        assert len(await ended) == 300_000
        await answered
        await asyncio.gather(*(ended for _, ended in jobs))
        assert began == ["first", "flood 0", "honest", "flood 1", "flood 2"]
        unpacker.close()

    asyncio.run(main())


def test_what_is_given_up_gets_no_thread_and_is_not_kept() -> None:
    async def main() -> None:
        unpacker, began = Unpacker(1), list[str]()
        blocked = Blocked()
        first, ended = new_job("first", began, blocked)
        unpacker.unpack("a", first)
        waiting, never = new_job("waiting", began)
        unpacker.unpack("b", waiting)
        unpacker.give_up("b", waiting)
        unpacker.give_up("a", first)
        assert blocked.given_up, "its thread stops at its next step"
        last, answered = new_job("last", began)
        unpacker.unpack("c", last)
        blocked.go_on.set()
        await answered
        assert began == ["first", "last"] and not ended.done() and not never.done()
        unpacker.close()

    asyncio.run(main())


def test_a_job_that_is_given_up_when_its_turn_comes_leaves_the_thread_to_the_next() -> None:
    async def main() -> None:
        unpacker, began = Unpacker(1), list[str]()
        job, never = new_job("no room", began)
        job.ready = lambda: unpacker.give_up("a", job)
        unpacker.unpack("a", job)
        last, answered = new_job("last", began)
        unpacker.unpack("a", last)
        await answered
        assert began == ["last"] and not never.done()
        unpacker.close()

    asyncio.run(main())


def test_a_pool_that_is_closed_gives_up_its_jobs() -> None:
    async def main() -> None:
        unpacker, began = Unpacker(1), list[str]()
        blocked = Blocked()
        first, ended = new_job("first", began, blocked)
        second, never = new_job("second", began)
        unpacker.unpack("a", first)
        unpacker.unpack("a", second)
        unpacker.close()
        blocked.go_on.set()
        await ended
        assert began == ["first"] and second.given_up and not never.done()

    asyncio.run(main())
