"""The server in a process of its own, its metrics, and loads that count every answer."""

import re
import shutil
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import torch
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.load import LoadError, Sample, framed, h2load, in_own_process
from export.to_int8 import to_int8
from export.to_onnx import to_onnx
from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.artifact import MODEL, Artifact, Training, Variant, digest, find, write_manifest
from serving.artifact import load as load_artifact
from serving.settings import DEFAULT_MODEL, embedded_models
from serving.tensorrt_options import BatchProfile
from training.model import CONFIGS, CapsNet

#: The network whose trained weights come with the repository. Others get random weights.
EMBEDDED = "accurate"
SERVICE = "/capsnet.v1.CapsNetService"

_ROOT = Path(__file__).parent.parent
_START_SECONDS = 120
_STOP_SECONDS = 40
_SETTLE_SECONDS = 2


@dataclass(frozen=True)
class Page:
    """The server's metrics at one moment: name, labels and value of each sample."""

    samples: tuple[tuple[str, Mapping[str, str], float], ...]

    @classmethod
    def parse(cls, text: bytes) -> "Page":
        families = text_string_to_metric_families(text.decode())
        return cls(tuple((one.name, one.labels, one.value) for family in families for one in family.samples))

    def total(self, name: str, **labels: str) -> float | None:
        """Return the sum of the samples with this name and these labels, or None if no sample has this name."""
        values = [(has, value) for sample, has, value in self.samples if sample == name]
        if not values:
            return None
        return sum(value for has, value in values if all(has.get(key) == one for key, one in labels.items()))


@dataclass(frozen=True)
class Served:
    """A running server.

    targets: the address for each transport: ``tcp``, and ``unix`` if the server can.
    began: the time just before its process was started, in seconds since 1970, like the times in its log. ca: the
    file of the authorities that the metrics' clients trust, or None without TLS.
    """

    process: "subprocess.Popen[bytes]"
    targets: dict[str, str]
    metrics_url: str
    log: Path
    began: float
    ca: Path | None = None

    def fetch(self, headers: Mapping[str, str] | None = None) -> bytes:
        """Return the metrics page as the server sends it for these headers. Raises OSError, HTTPException."""
        request = urllib.request.Request(self.metrics_url, headers=dict(headers or {}))
        context = ssl.create_default_context(cafile=self.ca) if self.ca else None
        with urllib.request.urlopen(request, timeout=10, context=context) as response:
            body: bytes = response.read()
        return body

    def page(self) -> Page:
        return Page.parse(self.fetch())

    def page_after(self, ok: float, method: str) -> Page:
        """Return the page once ``ok`` calls of this method have ended with OK and no call is in flight.

        Raises LoadError if that does not happen in time.
        """
        end = time.monotonic() + _SETTLE_SECONDS
        while True:
            page = self.page()
            begun, ended = (
                page.total(f"grpc_server_{name}_total", grpc_method=method) for name in ("started", "handled")
            )
            found = page.total("grpc_server_handled_total", grpc_method=method, grpc_code="OK")
            if begun == ended and found == ok:
                return page
            if time.monotonic() > end:
                counts = [f"{count or 0:.0f}" for count in (found, ended, begun, ok)]
                raise LoadError(
                    "{}: {} calls ended with OK, {} of {} ended; expected {} with OK".format(method, *counts)
                )
            time.sleep(0.05)


@cache
def _flags_of(command: tuple[str, ...], tree: Path) -> str:
    """Return the help of the server of a source tree, which names its flags."""
    return subprocess.run([*command, "--help"], cwd=tree, capture_output=True, text=True, check=True).stdout


@contextmanager
def serve(
    repository: Path,
    precision: str,
    flags: Sequence[str],
    folder: Path,
    poll_seconds: float = 0.05,
    program: Sequence[str] = ("serving",),
    ca: Path | None = None,
    tree: Path = _ROOT,
) -> Iterator[Served]:
    """Run ``python -m serving`` on free ports, and on a Unix socket in ``folder`` if the server supports one.

    poll_seconds: the time between checks of its log for the line that says that it serves. program: a module to run
    instead, and arguments before the flags. ca: authorities, if the flags turn TLS on. tree: the source tree of the
    server. Raises LoadError with the end of the log if it does not start.
    """
    log, unix_socket = folder / "server.log", folder / "socket"
    command = [sys.executable, "-m", *program]
    known = _flags_of(tuple(command), tree)
    command += ["--port=0", "--metrics-port=0", f"--models={repository}", f"--precision={precision}"]
    command += ["--http-port=-1"] if "--http-port" in known else []
    has_socket = "--unix-socket" in known
    command += [f"--unix-socket={unix_socket}"] if has_socket else []
    with log.open("wb") as stream:
        began = time.time()
        process = subprocess.Popen([*command, *flags], cwd=tree, stdout=stream, stderr=stream)
    try:
        ports = re.compile(r'gRPC on \S+:(\d+), metrics on (https?://[^\s"]+)')
        end = time.monotonic() + _START_SECONDS
        while not (found := ports.search(log.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > end:
                raise LoadError(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(poll_seconds)
        targets = {"tcp": f"127.0.0.1:{found[1]}"}
        targets |= {"unix": f"unix:{unix_socket}"} if has_socket else {}
        yield Served(process, targets, found[2], log, began, ca)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def encrypted(folder: Path) -> tuple[list[str], Path]:
    """Make a certificate for 127.0.0.1 by openssl. Return the server's flags for TLS, and the file of its authority.

    Raises LoadError without openssl.
    """
    key, certificate = folder / "server.key", folder / "server.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=server", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LoadError(f"openssl did not make a certificate: {error}") from error
    return [f"--tls-cert={certificate}", f"--tls-key={key}"], certificate


def repository(config: str, precision: str, folder: Path) -> Path:
    """Make a model repository in ``folder``, with the embedded model or with random weights, and return the folder."""
    if config == EMBEDDED:
        shutil.copytree(embedded_models() / DEFAULT_MODEL, folder / DEFAULT_MODEL)
        return folder
    torch.manual_seed(0)
    network = CapsNet(CONFIGS[config]).eval()
    with torch.no_grad():
        network.weight.mul_(3)  # poses as long as a trained network's
    shape = network.config.image_shape
    name = f"capsnet-{config}"
    version = folder / name / "1"
    version.mkdir(parents=True)
    model = to_onnx(network)
    onnx.save_model(model, version / MODEL)
    variants = {"fp32": Variant(MODEL, test_images=1)}
    if precision == "int8":
        images = torch.randint(0, 256, (64, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        onnx.save_model(to_int8(model, images), version / "int8.onnx")
        variants["int8"] = Variant("int8.onnx", test_images=1)
    labels = tuple(map(str, range(network.config.classes)))
    files = {variant.file: digest(version / variant.file) for variant in variants.values()}
    batches = BatchProfile(1, 8, 32)
    training = Training("none: random weights")
    write_manifest(
        Artifact(version, name, "1", labels, shape, network.config.digit_dim, files, variants, {}, batches, training)
    )
    return folder


@dataclass(frozen=True)
class Case:
    """A kind of load.

    in_flight: messages in flight. images: images in each message. streams: the number of streams; 0 for unary calls.
    """

    in_flight: int
    images: int = 1
    streams: int = 0

    @property
    def kind(self) -> str:
        return "stream" if self.streams else "unary"

    def __str__(self) -> str:
        kind = f"{self.streams} stream{'s' if self.streams > 1 else ''}" if self.streams else "unary"
        images = f", {self.images} images each" if self.images > 1 else ""
        return f"{kind}, {self.in_flight} in flight{images}"


def prepare(
    config: str, precision: str, folder: Path, cases: Sequence[Case]
) -> tuple[Path, Artifact, dict[Case, Path]]:
    """Return the repository and artifact to serve, and a file with the message of each case; files go to ``folder``."""
    models = repository(config, precision, folder)
    artifact = load_artifact(find(models))
    return models, artifact, write_bodies(folder, artifact.image_shape, cases)


def write_bodies(folder: Path, shape: tuple[int, int, int], cases: Sequence[Case]) -> dict[Case, Path]:
    """Write the framed message of each case to a file. Pixels are random: the time does not depend on them."""
    random = np.random.default_rng(0)
    files = {}
    for case in cases:
        images = [pb.Image(pixels=random.bytes(int(np.prod(shape)))) for _ in range(case.images)]
        request = pb.ClassifyRequest(images=images)
        message = pb.ClassifyStreamRequest(request=request) if case.streams else request
        files[case] = folder / f"{case.kind}-{case.images}"
        files[case].write_bytes(framed(message.SerializeToString()))
    return files


def load(
    served: Served, target: str, case: Case, body: Path, seconds: float, deadline: float | None = None
) -> tuple[Sample, Page, Page]:
    """Return one sample, and the metrics before and after it.

    deadline: the deadline of each unary call, in seconds. Raises LoadError if an answer is missing or not OK.
    """
    if case.streams:
        method, path = "ClassifyStream", f"{SERVICE}/ClassifyStream"
        before = served.page()
        arguments = ("--streams", case.streams, "--in-flight", case.in_flight, "--seconds", seconds)
        printed = in_own_process("streams", target, path, body, *arguments)
        sample = Sample(**printed | {"percentiles_ms": tuple(printed["percentiles_ms"])})
        expected = case.streams
    else:
        method, path = "Classify", f"{SERVICE}/Classify"
        first = h2load(target, path, body, case.in_flight, case.in_flight + 50)
        requests = max(2 * case.in_flight, round(seconds * first.requests / first.seconds))
        ended = served.page().total("grpc_server_handled_total", grpc_method=method, grpc_code="OK")
        before = served.page_after(ended or 0, method)
        sample = h2load(target, path, body, case.in_flight, requests, deadline=deadline)
        expected = requests
    ok = before.total("grpc_server_handled_total", grpc_method=method, grpc_code="OK") or 0
    return sample, before, served.page_after(ok + expected, method)
