"""``python -m benchmarks.gpu.served``: the server on one device under load, unary and with 64 images a request."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import write
from benchmarks.load import LoadError, framed, h2load
from protos.capsnet.v1 import capsnet_pb2 as pb

LOADS = ((1, 1), (16, 1), (64, 1), (256, 1), (4, 64), (16, 64))  # calls in flight, images in each
PATH = "/capsnet.v1.CapsNetService/Classify"
_START_SECONDS = 60


def body(folder: Path, images: int) -> Path:
    """Write a request of random pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, 784), dtype=np.uint8)
    message = pb.ClassifyRequest(images=[pb.Image(pixels=one.tobytes()) for one in pixels])
    file = folder / f"unary-{images}"
    file.write_bytes(framed(message.SerializeToString()))
    return file


def measure(device: str, flags: Sequence[str], seconds: float, warm_up: int, log: Path) -> list[dict[str, Any]]:
    """Start a server on the device, load it, and stop it. Raises RuntimeError if it does not start.

    warm_up: requests of each call in flight before those that are measured.
    """
    command = [sys.executable, *(["-S"] if sys.flags.no_site else []), "-m", "serving", "--device", device]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--port", "0", "--metrics-port", "0", "--http-port", "-1", *flags], stderr=output, stdout=output
        )
    rows = []
    try:
        port, metrics = _ports(server, log)
        page = urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=5).read().decode()
        providers = re.findall(r'provider="(\w+)"', page)
        with tempfile.TemporaryDirectory() as folder:
            for in_flight, images in LOADS:
                file = body(Path(folder), images)
                row: dict[str, Any] = {"device_flag": device, "provider": providers[0] if providers else ""}
                row |= {"in_flight": in_flight, "images": images}
                try:
                    target = f"127.0.0.1:{port}"
                    first = h2load(target, PATH, file, in_flight, warm_up * in_flight)
                    count = max(4 * in_flight, round(seconds * first.requests / first.seconds))
                    sample = h2load(target, PATH, file, in_flight, count)
                    rate = images * sample.requests / sample.seconds
                    row |= {"images_per_second": f"{rate:.4g}", "p50_ms": f"{sample.percentiles_ms[0]:.4g}"}
                    row |= {"p99_ms": f"{sample.percentiles_ms[2]:.4g}", "error": ""}
                except LoadError as error:
                    row |= {"images_per_second": "", "p50_ms": "", "p99_ms": "", "error": str(error)[:200]}
                print(row, flush=True)
                rows.append(row)
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
    return rows


def _ports(server: "subprocess.Popen[bytes]", log: Path) -> tuple[int, int]:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        if found := re.search(r"gRPC on \S+:(\d+), metrics on http://\S+:(\d+)/", log.read_text()):
            return int(found[1]), int(found[2])
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.served", allow_abbrev=False)
    parser.add_argument("--device", action="append", required=True, help="as the server's flag")
    parser.add_argument("--models", type=Path, help="model repository (default: the served one)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load")
    parser.add_argument("--warm-up", type=int, default=20, help="requests of each call in flight before them")
    parser.add_argument("--name", default="", help="what the device is called in the file")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    flags = ["--models", str(options.models)] if options.models else []
    rows: list[dict[str, Any]] = []
    for device in options.device:
        try:
            rows += measure(device, flags, options.seconds, options.warm_up, options.out / f"server-{device}.log")
        except RuntimeError as error:
            print(error, flush=True)
    if rows:
        cores = len(os.sched_getaffinity(0))
        write(options.out / "served.csv", [row | {"device": options.name, "cores": cores} for row in rows])
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
