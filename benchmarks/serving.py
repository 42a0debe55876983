"""``python -m benchmarks.serving``: the server compared with ONNX Runtime alone and with other servers, in one run."""

import argparse
import itertools
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.export import Predict, session
from benchmarks.figures import origin, write
from benchmarks.load import H2LOAD_MISSING, TLS_PREFIX, LoadError, Sample, h2load, h2load_version
from benchmarks.server import Case, Page, Served, encrypted, load, prepare, serve
from benchmarks.serving_picture import plot
from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.capsnet.v1.capsnet_pb2_grpc import CapsNetServiceStub
from serving.metrics.registry import CLASSIFY
from serving.runtime import usable_cores
from training.model import CONFIGS

TLS = "tls"
TRANSPORTS = ("tcp", "unix", TLS)
PEER_LOADS = (1, 16, 64)

_POSE_TOLERANCES = {"fp32": 1e-4, "int8": 0.2}  # greatest allowed difference of a component
_MAX_CEILINGS = 3
_PEER_BATCH_IMAGES = 32
_PEER_START_SECONDS = 60
_PEER_STOP_SECONDS = 5
#: The server's steps with a metric of their time. Each keeps one core busy.
STEPS = ("decode", "stack", "encode")
#: The metrics behind the figures. If a metric is missing, its columns stay empty.
METRICS = (
    "grpc_server_handled_total",
    "grpc_server_handling_seconds_sum",
    "capsnet_decode_seconds_sum",
    "capsnet_queue_seconds_sum",
    "capsnet_inference_seconds_sum",
    "capsnet_encode_seconds_sum",
    "capsnet_batch_size_images_sum",
    "process_cpu_seconds_total",
)
SHOWN_COLUMNS = (
    "images_per_second", "share_of_ceiling", "p50_ms", "p95_ms", "p99_ms", "cpu_us", "grpc_us", "decode_us",
    "infer_us", "encode_us", "queue_ms", "mean_batch",
)  # fmt: skip
COLUMNS = (
    "config", "precision", "sessions", "threads", "max_batch", "server", "transport", "load", "images",
    "images_per_second", "share_of_ceiling", "requests_per_second", "p50_ms", "p95_ms", "p99_ms",
    "cpu_us", "grpc_us", *(f"{step}_us" for step in STEPS), "infer_us", "queue_ms", "inference_ms", "handling_ms",
    "mean_batch", "client_cpu_us", "overhead_p50_ms", "server_overhead_ms", "not_run",
)  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """A setting of ONNX Runtime without a server: parallel sessions, threads of each, and images in a batch."""

    sessions: int
    threads: int
    batch: int

    def __str__(self) -> str:
        parallel = f"{self.sessions} sessions, " if self.sessions > 1 else ""
        return f"{parallel}{self.threads} thread{'s' if self.threads > 1 else ''}, batches of {self.batch}"


@dataclass(frozen=True)
class RawSample:
    images_per_second: float
    cpu_seconds_per_batch: float
    p50_ms: float


class OnnxRuntime:
    """The sessions of one model file. Each is made when it is first needed."""

    def __init__(self, file: Path, image_shape: tuple[int, int, int]) -> None:
        self._file = file
        self._shape = image_shape
        self._sessions: dict[tuple[int, int], Predict] = {}
        self._random = np.random.default_rng(0)

    def images(self, count: int) -> NDArray[np.uint8]:
        return self._random.integers(0, 256, (count, *self._shape), dtype=np.uint8)

    def predict(self, threads: int, number: int = 0) -> Predict:
        if (threads, number) not in self._sessions:
            self._sessions[threads, number] = session(self._file, threads)
        return self._sessions[threads, number]

    def measure(self, raw: Raw, seconds: float) -> RawSample:
        images = self.images(raw.batch)
        calls = [self.predict(raw.threads, number) for number in range(raw.sessions)]
        for call in calls:
            call(images)
        cpu, begin = time.process_time(), time.perf_counter()

        def repeat(call: Predict) -> list[float]:
            latencies: list[float] = []
            while not latencies or time.perf_counter() - begin < seconds:
                start = time.perf_counter()
                call(images)
                latencies.append(time.perf_counter() - start)
            return latencies

        with ThreadPoolExecutor(raw.sessions) as pool:
            latencies = [latency for one in pool.map(repeat, calls) for latency in one]
        elapsed, cpu = time.perf_counter() - begin, time.process_time() - cpu
        return RawSample(
            len(latencies) * raw.batch / elapsed, cpu / len(latencies), 1000 * statistics.median(latencies)
        )

    def fastest(self, cores: int, max_batch: int, seconds: float) -> list[Raw]:
        """Return the fastest settings among all splits of the cores and batch sizes up to the server's."""
        shares = [
            (cores // threads, threads) for threads in sorted({2**n for n in range(cores.bit_length())} | {cores})
        ]
        batches = sorted({size for size in (4, 8, 16, 32) if size < max_batch} | {max_batch})
        candidates = [
            Raw(sessions, threads, batch) for (sessions, threads), batch in itertools.product(shares, batches)
        ]
        speeds: dict[Raw, list[float]] = {one: [] for one in candidates}
        for _ in range(3):
            for one in candidates:
                speeds[one].append(self.measure(one, seconds / 5).images_per_second)
        return sorted(candidates, key=lambda one: -statistics.median(speeds[one]))[:_MAX_CEILINGS]


CASES = (
    Case(1),
    Case(16),
    Case(64),
    Case(256),
    Case(64, streams=1),
    Case(64, streams=4),
    Case(16, images=8),
    Case(4, images=64),
)


@dataclass(frozen=True)
class Setup:
    """The server's plan: parallel sessions, threads of each, and the largest batch."""

    sessions: int
    threads: int
    max_batch: int

    def raw(self, batch: int) -> Raw:
        return Raw(self.sessions, self.threads, batch)


def setup(page: Page, flags: Sequence[str]) -> Setup:
    """Return the server's plan from its metrics, or from its flags where the metrics lack it."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--threads", type=int, default=0)
    known.add_argument("--max-batch", type=int, default=32)
    said, _ = known.parse_known_args(list(flags))
    sessions, threads, max_batch = (
        page.total(f"capsnet_{name}", graph=CLASSIFY) for name in ("runtimes", "threads", "max_batch_images")
    )
    return Setup(
        int(sessions or 1), int(threads or said.threads or usable_cores()), int(max_batch or said.max_batch or 32)
    )


def of_sample(sample: Sample, images: int = 1) -> dict[str, float]:
    """Return the figures that the client measured, by column."""
    rate = sample.requests / sample.seconds
    latencies = dict(zip(("p50_ms", "p95_ms", "p99_ms"), sample.percentiles_ms, strict=True))
    return {
        "requests_per_second": rate,
        "images_per_second": rate * images,
        **latencies,
        "client_cpu_us": 1e6 * sample.client_cpu_seconds / sample.requests,
    }


def figures(
    case: Case, sample: Sample, before: Page, after: Page, one: RawSample, largest: RawSample, max_batch: int
) -> dict[str, float]:
    """Return the figures of a sample by column. Figures that the metrics lack are left out.

    one, largest: ONNX Runtime alone with the server's threads, for a batch of one image and of ``max_batch``. Between
    the two, CPU time is taken as linear in the batch size: this estimates the network's share of the server's CPU
    time, because the server measures inference in wall time only. Its other steps are measured in wall time, and the
    rest is gRPC's share.
    """

    def more(name: str, **labels: str) -> float | None:
        begin, end = before.total(name, **labels), after.total(name, **labels)
        return None if begin is None or end is None else end - begin

    method = "ClassifyStream" if case.streams else "Classify"
    requests = sample.requests
    result: dict[str, float | None] = {**of_sample(sample, case.images)}
    cpu, images, batches = (
        more("process_cpu_seconds_total"),
        *map(more, ("capsnet_batch_size_images_sum", "capsnet_batch_size_images_count")),
    )
    steps = {step: more(f"capsnet_{step}_seconds_sum") for step in STEPS}
    if cpu is not None:
        result["cpu_us"] = 1e6 * cpu / requests
    for step, seconds in steps.items():
        if seconds is not None:
            result[f"{step}_us"] = 1e6 * seconds / requests
    if images and batches:
        result["mean_batch"] = images / batches
        slope = (largest.cpu_seconds_per_batch - one.cpu_seconds_per_batch) / max(1, max_batch - 1)
        infer = images * slope + batches * (one.cpu_seconds_per_batch - slope)
        if cpu is not None:
            known = sum(seconds or 0 for seconds in steps.values())
            infer = min(infer, max(0.0, cpu - known))
            result["infer_us"] = 1e6 * infer / requests
            result["grpc_us"] = 1e6 * max(0.0, cpu - known - infer) / requests
    queue, inference = more("capsnet_queue_seconds_sum"), more("capsnet_inference_seconds_sum")
    waited = more("capsnet_queue_seconds_count")
    if queue is not None and waited:
        result["queue_ms"] = 1000 * queue / waited
    if inference is not None and batches:
        result["inference_ms"] = 1000 * inference / batches
    handling = more("grpc_server_handling_seconds_sum", grpc_method=method)
    if not case.streams and handling is not None:
        result["handling_ms"] = 1000 * handling / requests
    if case == Case(1):
        result["overhead_p50_ms"] = sample.percentiles_ms[0] - one.p50_ms
        if "handling_ms" in result and inference is not None and batches:
            result["server_overhead_ms"] = 1000 * (handling or 0) / requests - 1000 * inference / batches
    return {name: value for name, value in result.items() if value is not None}


@dataclass(frozen=True)
class Way:
    """A transport of a server. target: the address, as h2load's function takes it."""

    served: Served
    target: str

    def channel(self) -> grpc.Channel:
        if not self.target.startswith(TLS_PREFIX):
            return grpc.insecure_channel(self.target)
        assert self.served.ca
        trusted = grpc.ssl_channel_credentials(self.served.ca.read_bytes())
        return grpc.secure_channel(self.target.removeprefix(TLS_PREFIX), trusted)

    @property
    def cases(self) -> tuple[Case, ...]:
        """Return the loads of this transport: over TLS the unary ones, since our own client of streams has no TLS."""
        return tuple(case for case in CASES if not (case.streams and self.target.startswith(TLS_PREFIX)))


@contextmanager
def serve_each(models: Path, options: "Options", folder: Path) -> Iterator[dict[str, Way]]:
    """Run the server, and a second one with TLS if that is measured. Yield the ways by transport. Raises LoadError."""
    with ExitStack() as stack:
        served = stack.enter_context(serve(models, options.precision, options.flags, folder))
        ways = {transport: Way(served, target) for transport, target in served.targets.items()}
        if TLS in options.transports:
            second = folder / TLS
            second.mkdir()
            flags, ca = encrypted(second)
            served = stack.enter_context(serve(models, options.precision, [*options.flags, *flags], second, ca=ca))
            ways[TLS] = Way(served, TLS_PREFIX + served.targets["tcp"])
        yield ways


def check(ways: Mapping[str, Way], runtime: OnnxRuntime, threads: int, precision: str) -> None:
    """Raise LoadError if the poses of a server differ from ONNX Runtime's."""
    images = runtime.images(3)
    request = pb.ClassifyRequest(images=[pb.Image(pixels=image.tobytes()) for image in images])
    for transport, way in ways.items():
        with way.channel() as channel:
            answer = CapsNetServiceStub(channel).Classify(request, timeout=30)  # type: ignore[no-untyped-call]
        poses = np.array([[capsule.pose for capsule in result.capsules] for result in answer.results])
        difference = float(np.abs(poses - runtime.predict(threads)(images)).max())
        if not difference <= _POSE_TOLERANCES[precision]:
            raise LoadError(f"{transport}: poses differ from ONNX Runtime's by {difference:.2g}")


@dataclass(frozen=True)
class Peer:
    """Another server. path: the HTTP path that takes images. Its program is in ``benchmarks/peers``."""

    name: str
    path: str


PEERS = {peer.name: peer for peer in (Peer("mosec", "/inference"), Peer("litserve", "/predict"))}


@contextmanager
def running(peer: Peer, python: str, model: Path, folder: Path) -> Iterator[str]:
    """Run another server with this model file on all cores and yield its address.

    Raises LoadError if it does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        target = f"127.0.0.1:{free.getsockname()[1]}"
    program = Path(__file__).parent / "peers" / f"{peer.name}_server.py"
    log = folder / f"{peer.name}.log"
    arguments = [target.rpartition(":")[2], str(_PEER_BATCH_IMAGES), str(usable_cores())]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [python, str(program), str(model), *arguments],
            cwd=folder, stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + _PEER_START_SECONDS
        while not _listens(target):
            if process.poll() is not None or time.monotonic() > end:
                raise LoadError(f"{peer.name} did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield target
    finally:
        # A signal to the server alone may leave its workers behind, so the whole process group gets it.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_PEER_STOP_SECONDS)


def _listens(target: str) -> bool:
    host, _, port = target.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        return False
    return True


def load_peer(
    peer: Peer, target: str, runtime: OnnxRuntime, threads: int, seconds: float, folder: Path
) -> dict[int, Sample]:
    """Check one answer of a peer, then return samples of single images, by the number in flight.

    Raises LoadError if the peer does not answer, or if its numbers differ from ONNX Runtime's.
    """
    body = folder / "image"
    image = runtime.images(1)
    body.write_bytes(image.tobytes())
    poses = runtime.predict(threads)(image)
    request = urllib.request.Request(
        f"http://{target}{peer.path}", image.tobytes(), {"content-type": "application/octet-stream"}
    )
    end = time.monotonic() + _PEER_START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                answer = np.frombuffer(response.read(), np.float32)[-poses.size :]
            break
        except OSError as error:  # the port may be open before the model is loaded
            if time.monotonic() > end:
                raise LoadError(f"{peer.name}: {error}") from error
            time.sleep(0.1)
    difference = float(np.abs(answer - poses.ravel()).max())
    if not difference <= _POSE_TOLERANCES["fp32"]:
        raise LoadError(f"{peer.name}: poses differ from ONNX Runtime's by {difference:.2g}")
    samples = {}
    for in_flight in PEER_LOADS:
        first = h2load(target, peer.path, body, in_flight, 8 * in_flight, http1=True)
        requests = max(2 * in_flight, round(seconds * first.requests / first.seconds))
        samples[in_flight] = h2load(target, peer.path, body, in_flight, requests, http1=True)
    return samples


#: Server, transport and kind of load.
Key = tuple[str, str, str]


class Collected:
    """The figures of all rounds, by row and round. Rows keep the order of the first round."""

    def __init__(self) -> None:
        self.rows: dict[Key, dict[int, dict[str, float]]] = {}
        self.not_run: dict[Key, str] = {}
        #: Images a second of ONNX Runtime at its fastest settings, one sample a round.
        self.ceilings: dict[Raw, list[float]] = {}

    def add(self, key: Key, number: int, figures: dict[str, float]) -> None:
        self.rows.setdefault(key, {})[number] = figures

    def medians(self) -> Iterator[tuple[Key, dict[str, str]]]:
        """Yield the median of each row over its rounds. Shares of the ceiling are computed within each round.

        The ceiling is the setting of ONNX Runtime with the highest median.
        """
        best = max(self.ceilings, key=lambda raw: statistics.median(self.ceilings[raw]))
        speeds = self.ceilings[best]
        ceiling = {number: {"images_per_second": speed} for number, speed in enumerate(speeds)}
        for key, rounds in ({("onnxruntime", "", f"ceiling: {best}"): ceiling} | self.rows).items():
            for number, figures in rounds.items():
                figures["share_of_ceiling"] = figures["images_per_second"] / speeds[number]
            names = dict.fromkeys(name for figures in rounds.values() for name in figures)
            values = {name: [figures[name] for figures in rounds.values() if name in figures] for name in names}
            yield key, {name: f"{statistics.median(several):.4g}" for name, several in values.items()}
        for key, reason in self.not_run.items():
            yield key, {"not_run": reason}


@dataclass(frozen=True)
class Options:
    """The options of the command line that the measurement of one network needs."""

    precision: str
    rounds: int
    seconds: float
    flags: tuple[str, ...]
    transports: tuple[str, ...]
    peers: tuple[Peer, ...]
    peers_python: str


def measure(config: str, options: Options, folder: Path) -> tuple[Collected, dict[str, Any], set[str]]:
    """Measure one network in all cases. Return its figures, its setup, and the metrics that the server lacks.

    Raises LoadError if a server or a peer cannot run, or if an answer is wrong.
    """
    models, artifact, bodies = prepare(config, options.precision, folder, CASES)
    file = artifact.file(options.precision)
    runtime = OnnxRuntime(file, artifact.image_shape)
    collected = Collected()
    with serve_each(models, options, folder) as ways:
        chosen = setup(ways["tcp"].served.page(), options.flags)
        check(ways, runtime, chosen.threads, options.precision)
        largest_raw = Raw(1, chosen.threads, chosen.max_batch)
        fastest = runtime.fastest(usable_cores(), chosen.max_batch, options.seconds)
        collected.ceilings = {raw: [] for raw in (*fastest, largest_raw)}
        for transport in set(options.transports) - set(ways):
            collected.not_run["ours", transport, ""] = "the server has no setting for a Unix socket"
        # The transports take turns within each load, so that the machine's drift is the same for all.
        runs = [(transport, case) for case in CASES for transport, way in ways.items() if case in way.cases]
        runs = [run for run in runs if run[0] in options.transports]
        with tqdm(total=options.rounds * (len(runs) + len(options.peers)), desc=config, leave=False) as bar:
            for number in range(options.rounds):
                speeds: dict[Raw, list[float]] = {raw: [] for raw in collected.ceilings}
                measure_ceilings(runtime, speeds, options.seconds)
                one = runtime.measure(Raw(1, chosen.threads, 1), options.seconds / 2)
                largest = runtime.measure(largest_raw, options.seconds / 2)
                for transport, case in runs if number % 2 == 0 else runs[::-1]:
                    way = ways[transport]
                    sample, start, end = load(way.served, way.target, case, bodies[case], options.seconds)
                    values = figures(case, sample, start, end, one, largest, chosen.max_batch)
                    collected.add(("ours", transport, str(case)), number, values)
                    bar.update()
                for peer in options.peers:
                    with running(peer, options.peers_python, file, folder) as target:
                        samples = load_peer(peer, target, runtime, chosen.threads, options.seconds, folder)
                    for in_flight, sample in samples.items():
                        collected.add((peer.name, "tcp", str(Case(in_flight))), number, of_sample(sample))
                    bar.update()
                measure_ceilings(runtime, speeds, options.seconds)
                for raw, several in speeds.items():
                    collected.ceilings[raw].append(statistics.mean(several))
                for raw, sampled in ((Raw(1, chosen.threads, 1), one), (largest_raw, largest)):
                    values = {"images_per_second": sampled.images_per_second, "p50_ms": sampled.p50_ms}
                    values["cpu_us"] = 1e6 * sampled.cpu_seconds_per_batch / raw.batch
                    collected.add(("onnxruntime", "", str(raw)), number, values)
        page = ways["tcp"].served.page()
    missing = {name for name in METRICS if page.total(name) is None}
    return collected, {"sessions": chosen.sessions, "threads": chosen.threads, "max_batch": chosen.max_batch}, missing


def measure_ceilings(runtime: OnnxRuntime, speeds: dict[Raw, list[float]], seconds: float) -> None:
    """Add a sample of each setting. It runs at both ends of a round, so that the machine's drift cancels."""
    for raw, several in speeds.items():
        several.append(runtime.measure(raw, seconds / 4).images_per_second)


def show(config: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of one network as a table."""
    title = f"{config} ({rows[0]['precision']})"
    print(f"\n{title:<54}" + "".join(f"{name.rpartition('_')[0] or name:>12}" for name in SHOWN_COLUMNS))
    print(f"{'':<54}" + "".join(f"{name.rpartition('_')[2]:>12}" for name in SHOWN_COLUMNS))
    for row in rows:
        who = " ".join(filter(None, (row["server"], row["transport"], row["load"])))
        if row.get("not_run"):
            print(f"{who:<54} not run: {row['not_run']}")
        else:
            print(f"{who:<54}" + "".join(f"{row.get(name, ''):>12}" for name in SHOWN_COLUMNS))


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    command.add_argument("--configs", nargs="+", choices=CONFIGS, default=["compact", "paper"], help="networks")
    command.add_argument("--precision", choices=sorted(_POSE_TOLERANCES), default="fp32")
    command.add_argument("--rounds", type=int, default=5, metavar="N", help="samples of each figure (default: 5)")
    command.add_argument("--seconds", type=float, default=2.0, help="of each sample (default: 2)")
    command.add_argument("--settings", default="", metavar="FLAGS", help="more flags for the server, in one argument")
    command.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=["tcp", "unix"])
    command.add_argument("--peers", nargs="+", choices=PEERS, default=[], help="other servers to measure in each round")
    command.add_argument("--peers-python", metavar="FILE", help="Python in which the peers are installed")
    command.add_argument("--out", type=Path, help="write the figures to this CSV file too")
    command.add_argument("--plot", type=Path, help="write a picture of them to this PNG file")
    given = command.parse_args(arguments)
    if given.rounds < 1 or not given.seconds > 0:
        command.error("--rounds and --seconds: expected numbers above 0")
    if given.peers and not given.peers_python:
        command.error("--peers: expected --peers-python as well, a Python in which they are installed")
    if given.peers and given.precision != "fp32":
        command.error("--peers: they are compared in fp32 only")
    version = h2load_version()
    if version is None:
        print(H2LOAD_MISSING, file=sys.stderr)
        return 2
    options = Options(
        given.precision, given.rounds, given.seconds, tuple(shlex.split(given.settings)), tuple(given.transports),
        tuple(PEERS[name] for name in given.peers), str(Path(given.peers_python or "").absolute()),
    )  # fmt: skip
    how = {
        "rounds": given.rounds, "seconds": given.seconds, "settings": given.settings,
        "h2load": version.rpartition("/")[2], **origin(),
    }  # fmt: skip
    images = {str(case): case.images for case in CASES}
    rows: list[dict[str, Any]] = []
    missing: set[str] = set()
    for config in given.configs:
        with tempfile.TemporaryDirectory() as folder:
            try:
                collected, chosen, lacking = measure(config, options, Path(folder))
            except LoadError as error:
                print(f"{config}: {error}", file=sys.stderr)
                return 1
        missing |= lacking
        found = [
            {"config": config, "precision": given.precision, **chosen}
            | {"server": server, "transport": transport, "load": load_, "images": images.get(load_, "")}
            | values
            for (server, transport, load_), values in collected.medians()
        ]
        show(config, found)
        rows += [row | how for row in found]
    if given.out:
        write(given.out, rows, (*COLUMNS, *how))
    if given.plot:
        plot(rows).savefig(given.plot, dpi=110)
    if missing:
        print(f"the server's metrics lack {', '.join(sorted(missing))}: columns stay empty", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
