"""``python -m benchmarks.transport``: the cost of a call in each transport, side by side, with one method table."""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvloop
from tqdm import tqdm

from benchmarks.figures import origin, write
from benchmarks.load import H2LOAD_MISSING, LoadError, framed, h2load, h2load_version, in_own_process
from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.transport.grpcio_server import GrpcioServer
from serving.transport.methods import (
    TRANSPORTS,
    CallbackMethod,
    Context,
    Method,
    StreamMethod,
    TransportLimits,
    TransportServer,
    table,
)
from serving.transport.server import GrpcServer

#: As large as a digit's request and its answer.
REQUEST = bytes(804)
ANSWER = pb.ClassifyStreamResponse(response=pb.ClassifyResponse(model_name=760 * "m")).SerializeToString()
#: As large as a request of 64 digits and its answer.
LARGE_REQUEST = bytes(64 * 788)
LARGE_ANSWER = bytes(64 * 760)
OURS, THEIRS = TRANSPORTS
IN_FLIGHT = 64
_SERVICE = "benchmark.Echo"
_UNARY, _LARGE, _STREAM = "unary", "large unary", "streamed"
_STREAMS = 4
_TICKS = os.sysconf("SC_CLK_TCK")
_LARGE_SHARE = 8  # a sample has so many times fewer large calls


def _unary(request: bytes, context: Context) -> None:
    context.answer(ANSWER)


def _large(request: bytes, context: Context) -> None:
    context.answer(LARGE_ANSWER)


async def _stream(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
    async for _ in requests:
        yield ANSWER


async def serve(transport: str) -> None:
    """Print the port, then answer each request with the same bytes until the process ends."""
    limits = TransportLimits(2**22, "", 2**28, "")
    server: TransportServer = GrpcServer(limits) if transport == OURS else GrpcioServer(limits)
    methods: dict[str, Method] = {
        "Unary": CallbackMethod(_unary),
        "Large": CallbackMethod(_large),
        "Stream": StreamMethod(_stream),
    }
    server.add_methods(table(_SERVICE, methods))
    port = await server.listen("127.0.0.1", 0)
    await server.start()
    print(port, flush=True)
    await asyncio.Event().wait()


@contextmanager
def _process(transport: str) -> Iterator[tuple[int, str]]:
    """Start a server in a process of its own. Yield its process id and its address."""
    command = [sys.executable, "-m", "benchmarks.transport", "--serve", transport]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) as process:
        assert process.stdout
        try:
            yield process.pid, f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def _cpu_seconds(process: int) -> float:
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / _TICKS


@dataclass
class Collected:
    """The figures of one transport and kind of call, one figure for each round."""

    per_second: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)


def measure(rounds: int, calls: int, seconds: float, folder: Path) -> dict[tuple[str, str], Collected]:
    """Measure every transport and kind of call in turns. Raises LoadError if a call fails."""
    body, large = folder / "body", folder / "large"
    body.write_bytes(framed(REQUEST))
    large.write_bytes(framed(LARGE_REQUEST))
    found = {(kind, transport): Collected() for kind in (_UNARY, _LARGE, _STREAM) for transport in (OURS, THEIRS)}
    with ExitStack() as stack, tqdm(total=rounds * len(found), leave=False) as bar:
        servers = {transport: stack.enter_context(_process(transport)) for transport in (OURS, THEIRS)}
        for number in range(rounds + 1):
            for (kind, transport), collected in found.items():
                process, target = servers[transport]
                before = _cpu_seconds(process)
                if kind == _UNARY:
                    sample = h2load(target, f"/{_SERVICE}/Unary", body, IN_FLIGHT, calls)
                    done, took = sample.requests, sample.seconds
                elif kind == _LARGE:
                    sample = h2load(target, f"/{_SERVICE}/Large", large, IN_FLIGHT, max(1, calls // _LARGE_SHARE))
                    done, took = sample.requests, sample.seconds
                else:
                    told = in_own_process(
                        "streams", "--seconds", seconds, "--streams", _STREAMS, "--in-flight", IN_FLIGHT,
                        target, f"/{_SERVICE}/Stream", body,
                    )  # fmt: skip
                    done, took = told["requests"], told["seconds"]
                if number:  # the first round warms up
                    collected.per_second.append(done / took)
                    collected.cpu_us.append(1e6 * (_cpu_seconds(process) - before) / done)
                    bar.update()
    return found


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.transport", description=__doc__)
    command.add_argument("--rounds", type=int, default=7, metavar="N", help="samples of each figure (default: 7)")
    command.add_argument(
        "--calls", type=int, default=10_000, metavar="N", help="unary calls of a sample (default: 10000)"
    )
    command.add_argument("--seconds", type=float, default=1.0, help="length of a sample of streams (default: 1)")
    command.add_argument("--out", type=Path, help="write the figures to this CSV file too")
    command.add_argument("--serve", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    options = command.parse_args(arguments)
    if options.serve:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(options.serve))
    if options.rounds < 1 or options.calls < 1 or not options.seconds > 0:
        command.error("--rounds, --calls and --seconds: expected numbers above 0")
    version = h2load_version()
    if version is None:
        print(H2LOAD_MISSING, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = measure(options.rounds, options.calls, options.seconds, Path(folder))
        except LoadError as error:
            print(error, file=sys.stderr)
            return 1
    rows = []
    for (kind, transport), collected in found.items():
        theirs = found[kind, THEIRS]
        ratios = [other / mine for mine, other in zip(collected.cpu_us, theirs.cpu_us, strict=True)]
        rows.append(
            {
                "calls": kind,
                "transport": transport,
                "per_second": f"{statistics.median(collected.per_second):.4g}",
                "server_cpu_us": f"{statistics.median(collected.cpu_us):.3g}",
                "times_cheaper": f"{statistics.median(ratios):.3g}",
                "times_cheaper_least": f"{min(ratios):.3g}",
                "times_cheaper_most": f"{max(ratios):.3g}",
                "in_flight": IN_FLIGHT,
                "rounds": options.rounds,
                "h2load": version.rpartition("/")[2],
                **origin(),
            }
        )
    for row in rows:
        print("".join(f"{row[name]:>20}" for name in list(row)[:7]))
    if options.out:
        write(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
