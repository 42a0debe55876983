"""One server under a soak: its load, its changes, and the samples of its state."""

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine, Mapping
from contextlib import suppress

import grpc

from benchmarks.load import LoadError
from benchmarks.soak.calls import KINDS, Kind, classify_one, timed
from benchmarks.soak.changes import Changes
from benchmarks.soak.client import Client, WrongAnswer, connection_losses
from benchmarks.soak.served import Held, left_over
from benchmarks.soak.windows import RIGHT, UNEXPECTED, WRONG, Window, process_state
from serving.access.tokens import TokenEntry

#: Calls at once; above it the load waits.
_MAX_CALLS = 128
_SAMPLE_SECONDS = 1.0
_MAX_FAULTS_SHOWN = 20
_SHOWN_LOG = 2000  # characters of it
#: Pauses between the changes of a kind, as shares of the soak's length, and at most, in seconds.
_PAUSES: Mapping[str, tuple[float, float]] = {
    "swap_models": (1 / 12, 20.0),
    "unload_a_model": (1 / 15, 13.0),
    "renew_tokens": (1 / 8, 17.0),
    "renew_certificates": (1 / 8, 23.0),
}


class Soak:
    """The soak of one server.

    rate: calls a second. windows: those that have ended, and the one that runs. faults: what went wrong, in words.
    """

    def __init__(self, client: Client, entries: list[TokenEntry], rate: float, seconds: float, window: float) -> None:
        self.client = client
        self.windows = [Window()]
        self.faults: list[str] = []
        self._changes = Changes(client, entries)
        self._rate, self._seconds, self._window_seconds = rate, seconds, window
        self._calls: set[asyncio.Task[None]] = set()
        self._outcomes_of: dict[str, Counter[str]] = {kind.name: Counter() for kind in KINDS}

    @property
    def outcomes_by_kind(self) -> dict[str, Counter[str]]:
        """Return the number of calls of each kind, by outcome."""
        return self._outcomes_of

    async def run(self) -> None:
        """Run the soak. Whatever goes wrong is in ``faults`` afterwards."""
        self._begin = time.monotonic()
        lost = asyncio.create_task(connection_losses(self.client.channel))
        beside = [
            asyncio.create_task(self._beside(name, getattr(self._changes, name)(min(most, share * self._seconds))))
            for name, (share, most) in _PAUSES.items()
        ]
        sampler = asyncio.create_task(self._beside("samples", self._sample()))
        await self._load()
        for task in (*beside, sampler):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        self._end_window()
        if lost.done():
            self._fault(f"the connection was lost: {lost.result()}")
        lost.cancel()
        await self._changes.close()
        await self.client.channel.close(None)
        files = process_state(self.client.server.served.process.pid).files  # which the windows judge
        left = await asyncio.to_thread(left_over, self.client.server, Held({}, 0, files))
        for name, amount in left.items():
            self._fault(f"the server still holds {amount:g} {name} after the soak")
        _, traceback, text = self.client.server.log_text.partition("Traceback")
        if traceback:
            self._fault(f"the log has a traceback{text[:_SHOWN_LOG]}")

    async def _load(self) -> None:
        """Begin calls at a steady rate until the end, then wait for those in flight."""
        kinds, weights = list(KINDS), [kind.weight for kind in KINDS]
        number = 0
        while (due := self._begin + number / self._rate) < self._begin + self._seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            [kind] = self.client.random.choices(kinds, weights)
            task = asyncio.create_task(self._call(kind))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)
            if len(self._calls) >= _MAX_CALLS:
                await asyncio.wait(self._calls, return_when=asyncio.FIRST_COMPLETED)
            number += 1
            if time.monotonic() > self._begin + self._seconds:
                break
        if self._calls:
            await asyncio.wait(self._calls)

    async def _call(self, kind: Kind) -> None:
        try:
            outcome, milliseconds = await timed(kind, self.client)
        except WrongAnswer as error:
            outcome = WRONG
            self._fault(f"{kind.name}: {error}")
        except grpc.aio.AioRpcError as error:
            outcome = UNEXPECTED
            self._fault(f"{kind.name}: {error.code().name} {error.details()}")
        except (OSError, TimeoutError) as error:
            outcome = UNEXPECTED
            self._fault(f"{kind.name}: {error!r}")
        else:
            if kind.make is classify_one and outcome == RIGHT:
                self.windows[-1].latencies_ms.append(milliseconds)
        self.windows[-1].outcomes[outcome] += 1
        self._outcomes_of[kind.name][outcome] += 1

    async def _beside(self, name: str, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except (WrongAnswer, LoadError, OSError) as error:
            self._fault(f"{name}: {error}")
        except grpc.aio.AioRpcError as error:
            self._fault(f"{name}: {error.code().name} {error.details()}")

    async def _sample(self) -> None:
        """Take a sample of the process now and then, and begin new windows."""
        while True:
            window = self.windows[-1]
            window.states.append(process_state(self.client.server.served.process.pid))
            if time.monotonic() - self._begin >= len(self.windows) * self._window_seconds:
                self._end_window()
                self.windows.append(Window())
            await asyncio.sleep(_SAMPLE_SECONDS)

    def _end_window(self) -> None:
        """Note the end of the window that runs; the last one counts only if it was long enough to have a sample."""
        window = self.windows[-1]
        window.at = time.monotonic() - self._begin
        window.changes = self._changes.made.copy()
        if not window.states and len(self.windows) > 1:
            self.windows[-2].outcomes += self.windows.pop().outcomes

    def _fault(self, text: str) -> None:
        if len(self.faults) < _MAX_FAULTS_SHOWN:
            self.faults.append(text)
