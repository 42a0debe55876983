"""The server's settings: each is said once, as a field, and set by flag, environment variable or default."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from serving.artifact import PRECISIONS
from serving.logs import FORMATS, LEVELS
from serving.runtime import DEVICES
from serving.transport.methods import TRANSPORTS

ENVIRONMENT_PREFIX = "CAPSNET_"


def embedded_models() -> Path:
    """The model repository that comes with the package: beside the code in a checkout, inside it when installed."""
    package = Path(__file__).parent
    inside = package / "models"
    return inside if inside.is_dir() else package.parent / "models"


def _setting(default: Any, text: str, **options: Any) -> Any:
    return field(default=default, metadata={"help": text, **options})


@dataclass(frozen=True)
class Settings:
    """Everything that can be set. Raises ValueError where settings do not fit together."""

    host: str = _setting(
        "127.0.0.1", "address to listen on, for gRPC and metrics; 0.0.0.0 for every interface", metavar="ADDRESS"
    )
    port: int = _setting(8001, "port of gRPC; 0 for any free one", least=0, most=65535)
    metrics_port: int = _setting(8002, "port of the Prometheus metrics (HTTP); 0 for any free one", least=0, most=65535)
    models: str = _setting(
        "",
        "model repository, a folder of NAME/VERSION/ folders (default: the one that comes with the server)",
        metavar="FOLDER",
    )
    model: str = _setting("", "name of the only model to serve (default: all of the repository)", metavar="NAME")
    model_version: str = _setting("", "only version to serve (default: the highest)", metavar="N")
    versions: int = _setting(1, "how many of a model's versions to serve at once, from the highest down", least=1)
    poll_seconds: float = _setting(
        5.0, "seconds between looks at the repository for new versions; 0 for looks at a SIGHUP alone", least=0
    )
    admin_port: int = _setting(
        -1,
        "port of RepositoryModelLoad and RepositoryModelUnload; 0 for any free one, -1 for none",
        least=-1,
        most=65535,
    )
    connection_seconds: float = _setting(
        0.0,
        "age at which a client's connection is renewed, so that it can find new servers; 0 for never",
        least=0,
        most=86400 * 365,
    )
    transport: str = _setting(
        "native",
        "native, or grpcio for gRPC's own server, which takes many times the CPU time a call",
        choices=TRANSPORTS,
        metavar="TRANSPORT",
    )
    unix_socket: str = _setting("", "path of a Unix socket to serve gRPC on, beside the port", metavar="PATH")
    device: str = _setting(
        "auto",
        "auto takes CUDA where it works and else the CPU; cuda and tensorrt fail where these do not work",
        choices=DEVICES,
        metavar="DEVICE",
    )
    precision: str = _setting(
        "fp32",
        "fp32; int8, faster on a CPU; or fp16, for a GPU; the model's CERTIFICATE.md says what each costs",
        choices=PRECISIONS,
        metavar="PRECISION",
    )
    engine_cache: str = _setting(
        "", "folder for the engines that TensorRT builds (default: ~/.cache/capsnet/tensorrt)", metavar="FOLDER"
    )
    threads: int = _setting(0, "threads of one batch; 0 to choose by measurement", least=0, most=256)
    runtimes: int = _setting(0, "batches computed in parallel; 0 to choose by measurement", least=0, most=256)
    max_batch: int = _setting(0, "most images in one batch; 0 to choose by measurement", least=0, most=4096)
    batch_timeout: float = _setting(30.0, "seconds after which a batch that is not computed is given up", least=0.001)
    priority_ageing: float = _setting(
        0.25, "seconds of waiting after which a request is not overtaken by those of high priority", least=0
    )
    max_queue: int = _setting(2048, "most images that wait; what does not fit gets RESOURCE_EXHAUSTED", least=1)
    max_images_per_request: int = _setting(1024, "most images in one request", least=1)
    max_request_bytes: int = _setting(4 * 2**20, "largest request, in bytes", least=1024, most=2**29)
    max_bytes_under_way: int = _setting(
        2**28, "most bytes of all requests under way; what does not fit gets RESOURCE_EXHAUSTED", least=2**16
    )
    stream_window: int = _setting(512, "most images of one stream under way; reading waits beyond", least=1)
    log_format: str = _setting("text", "text, or json for programs", choices=FORMATS, metavar="FORMAT")
    log_level: str = _setting("info", "debug, info, warning or error", choices=LEVELS, metavar="LEVEL")
    trace_endpoint: str = _setting(
        "", "OpenTelemetry collector to send traces to, by OTLP over gRPC; needs the extra tracing", metavar="URL"
    )
    drain_delay: float = _setting(
        0.0, "seconds between reporting NOT_SERVING and refusing new requests, for balancers to notice", least=0
    )
    drain_seconds: float = _setting(30.0, "most seconds that requests under way get to finish at a stop", least=0)

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, least = getattr(self, setting.name), setting.metadata.get("least")
            if least is not None and not value >= least:
                raise ValueError(f"{setting.name}: {value}; expected {least} or more")
            most = setting.metadata.get("most")
            if most is not None and value > most:
                raise ValueError(f"{setting.name}: {value}; expected {most} or less")
            choices = setting.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(f"{setting.name}: {value!r}; expected one of {', '.join(choices)}")
        if self.max_images_per_request > self.max_queue:
            raise ValueError(
                f"max_images_per_request: {self.max_images_per_request}; the queue holds only {self.max_queue} "
                "(max_queue), so such a request could never be taken"
            )

    @property
    def repository(self) -> Path:
        return Path(self.models) if self.models else embedded_models()


def read(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings from command line and environment; a flag wins over its variable.

    Ends the process with a message, as argparse does, on a wrong one.
    """
    parser = argparse.ArgumentParser(
        prog="python -m serving",
        allow_abbrev=False,
        description="Serve a capsule network over gRPC, with Prometheus metrics.",
        epilog=f"Every setting is also an environment variable: --max-batch is {ENVIRONMENT_PREFIX}MAX_BATCH. "
        "A flag wins over its variable.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    values: dict[str, Any] = {}
    for setting in fields(Settings):
        kind: type[int] | type[float] | type[str] = type(setting.default)  # type: ignore[assignment]
        default = f" (default: {setting.default})" if setting.default != "" else ""
        parser.add_argument(
            "--" + setting.name.replace("_", "-"),
            type=kind,
            metavar=setting.metadata.get("metavar", "SECONDS" if kind is float else "N"),
            help=setting.metadata["help"] + default,
            default=argparse.SUPPRESS,
        )
        variable = ENVIRONMENT_PREFIX + setting.name.upper()
        if environment.get(variable):  # an empty one is as none, as compose files have it
            try:
                values[setting.name] = kind(environment[variable])
            except ValueError:
                parser.error(f"environment variable {variable}: {environment[variable]!r} is not a number")
    values |= vars(parser.parse_args(arguments))
    try:
        return Settings(**values)
    except ValueError as error:
        parser.error(str(error))


def usable_cores() -> int:
    """How many cores this process may use, by its affinity and by its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no control groups, or no quota ("max")
        return cores
