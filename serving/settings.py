"""The server's settings: each is one field, set by flag, environment variable, file or default."""

import argparse
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from serving.artifact import MAX_FILE_BYTES, PRECISIONS
from serving.files.image_headers import MAX_IMAGE_BYTES
from serving.files.options import add_flags, check, option, option_of
from serving.files.program import add_version
from serving.logs import FORMATS, LEVELS
from serving.runtime import DEVICES
from serving.transport.methods import DEFAULT_CALLS, TRANSPORTS, is_loopback

#: The model that is served without any choice: the first of those that come with the server.
DEFAULT_MODEL = "capsnet-mnist"
ENVIRONMENT_PREFIX = "CAPSNET_"
# Variables of docker-compose.yml. They may also be set for a server that starts without it.
_OTHER_VARIABLES = ("CAPSNET_CPUS", "CAPSNET_TRAINING_")
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT|PORT_\w+)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_TOML_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}
_TRUTH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_HOST = re.compile(r"[\w.-]+|[0-9a-f:.]+(%\w+)?")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")


def embedded_models() -> Path:
    """Return the model repository of the package: beside the code in a checkout, inside the installed package."""
    package = Path(__file__).parent
    inside = package / "models"
    return inside if inside.is_dir() else package.parent / "models"


@dataclass(frozen=True)
class Settings:
    """All settings of the server. Raises ValueError for a wrong value, or if settings contradict each other."""

    host: str = option(
        "127.0.0.1", "address to listen on, for gRPC, HTTP and metrics; 0.0.0.0 for every interface", metavar="ADDRESS"
    )
    port: int = option(8001, "port of gRPC; 0 for any free one", minimum=0, maximum=65535)
    metrics_port: int = option(
        8002, "port of the Prometheus metrics (HTTP); 0 for any free one", minimum=0, maximum=65535
    )
    http_port: int = option(
        8000, "port of HTTP: REST and the page; 0 for any free one, -1 for none", minimum=-1, maximum=65535
    )
    models: str = option(
        "",
        "model repository, a folder of NAME/VERSION/ folders (default: the one that comes with the server)",
        metavar="FOLDER",
    )
    model: str = option(
        "",
        f"name of the only model to serve (default: all of the repository, or {DEFAULT_MODEL} without --models)",
        metavar="NAME",
    )
    model_version: str = option("", "only version to serve (default: the highest)", metavar="N")
    versions: int = option(1, "how many of a model's versions to serve at once, from the highest down", minimum=1)
    max_model_bytes: int = option(MAX_FILE_BYTES, "largest file of a model, in bytes", minimum=2**16)
    poll_seconds: float = option(
        5.0,
        "seconds between looks at the repository for new versions; 0 for looks at a SIGHUP alone",
        minimum=0,
        metavar="SECONDS",
    )
    admin_port: int = option(
        -1,
        "port of RepositoryModelLoad and RepositoryModelUnload; 0 for any free one, -1 for none",
        minimum=-1,
        maximum=65535,
    )
    tls_cert: str = option(
        "",
        "certificate chain (PEM), with which gRPC, HTTP and metrics are encrypted; read again when it changes",
        metavar="FILE",
    )
    tls_key: str = option("", "private key (PEM) of that certificate", metavar="FILE")
    tls_client_ca: str = option(
        "", "authorities (PEM); only clients with a certificate that one of them signed may call", metavar="FILE"
    )
    tokens: str = option(
        "", "file of tokens that python -m serving.tokens makes; only clients with one may call", metavar="FILE"
    )
    insecure: bool = option(False, "allow a host that others can reach without TLS and without tokens")
    reflection: bool = option(True, "serve gRPC reflection, which tells the services and messages")
    client_calls: int = option(0, "most calls of one client in flight; 0 for any number", minimum=0)
    client_rate: float = option(0.0, "most calls a second of one client; 0 for any number", minimum=0)
    connection_seconds: float = option(
        0.0,
        "age at which a client's connection is renewed, so that it can find new servers; 0 for never",
        minimum=0,
        maximum=86400 * 365,
        metavar="SECONDS",
    )
    idle_seconds: float = option(
        600.0,
        "seconds without calls after which a client's connection is closed; 0 for never",
        minimum=0,
        maximum=86400 * 365,
        metavar="SECONDS",
    )
    max_connections: int = option(1000, "most connections of all clients together; 0 for any number", minimum=0)
    max_connections_per_client: int = option(
        256,
        "most connections of one client of another machine, an address or a /64 of IPv6; 0 for any number",
        minimum=0,
    )
    max_calls_per_connection: int = option(
        DEFAULT_CALLS, "most calls of one connection in flight", minimum=1, maximum=2**31 - 1
    )
    transport: str = option(
        "native",
        "native, or grpcio for gRPC's own server, which takes many times the CPU time a call",
        choices=TRANSPORTS,
        metavar="TRANSPORT",
    )
    unix_socket: str = option("", "path of a Unix socket to serve gRPC on, beside the port", metavar="PATH")
    device: str = option(
        "auto",
        "auto takes CUDA where it works and else the CPU; cuda and tensorrt fail where these do not work",
        choices=DEVICES,
        parse=str.lower,
        metavar="DEVICE",
    )
    precision: str = option(
        "fp32",
        "fp32; int8, faster on a CPU; or fp16, for a GPU; the model's CERTIFICATE.md says what each costs",
        choices=PRECISIONS,
        parse=str.lower,
        metavar="PRECISION",
    )
    engine_cache: str = option(
        "", "folder for the engines that TensorRT builds (default: ~/.cache/capsnet/tensorrt)", metavar="FOLDER"
    )
    threads: int = option(0, "threads of one batch; 0 to choose by measurement", minimum=0, maximum=256)
    runtimes: int = option(0, "batches computed in parallel; 0 to choose by measurement", minimum=0, maximum=256)
    max_batch: int = option(0, "most images in one batch; 0 to choose by measurement", minimum=0, maximum=4096)
    batch_timeout: float = option(
        30.0, "seconds after which a batch that is not computed is given up", minimum=0.001, metavar="SECONDS"
    )
    priority_ageing: float = option(
        0.25,
        "seconds of waiting after which a request is not overtaken by those of high priority",
        minimum=0,
        metavar="SECONDS",
    )
    max_queue: int = option(2048, "most images that wait; what does not fit gets RESOURCE_EXHAUSTED", minimum=1)
    max_images_per_request: int = option(1024, "most images in one request", minimum=1)
    max_explained_images: int = option(
        8, "most images in one request for explanations, each of which takes about 200 images", minimum=1
    )
    max_request_bytes: int = option(9 * 2**20, "largest request, in bytes", minimum=1024, maximum=2**29)
    max_bytes_under_way: int = option(
        2**26, "most bytes of all requests under way; what does not fit gets RESOURCE_EXHAUSTED", minimum=2**16
    )
    max_image_bytes: int = option(MAX_IMAGE_BYTES, "largest PNG or JPEG file in a request, in bytes", minimum=1024)
    max_image_pixels: int = option(
        2**20, "most pixels of a model's images; a model with larger ones is not loaded", minimum=1
    )
    max_picture_pixels: int = option(
        2**23,
        "most pixels to which a picture is decoded before it is prepared for the model (PREPROCESS_AUTO)",
        minimum=1,
    )
    max_image_memory: int = option(
        96 * 2**20, "most bytes of memory for decoding images; further requests wait", minimum=2**16
    )
    image_threads: int = option(2, "threads that decode images", minimum=1, maximum=256)
    image_timeout: float = option(
        5.0,
        "seconds after which a request whose images are not decoded gets RESOURCE_EXHAUSTED",
        minimum=0.001,
        metavar="SECONDS",
    )
    stream_window: int = option(512, "most images of one stream under way; reading waits beyond", minimum=1)
    log_format: str = option("text", "text, or json for programs", choices=FORMATS, parse=str.lower, metavar="FORMAT")
    log_level: str = option("info", "debug, info, warning or error", choices=LEVELS, parse=str.lower, metavar="LEVEL")
    trace_endpoint: str = option(
        "", "OpenTelemetry collector to send traces to, by OTLP over gRPC; needs the extra tracing", metavar="URL"
    )
    drain_delay: float = option(
        0.0,
        "seconds between reporting NOT_SERVING and refusing new requests, for balancers to notice",
        minimum=0,
        metavar="SECONDS",
    )
    drain_seconds: float = option(
        30.0, "most seconds that requests under way get to finish at a stop", minimum=0, metavar="SECONDS"
    )

    settings_file: str = option(
        "", "TOML file of settings by their names, such as max_batch = 16; flags and variables win", metavar="FILE"
    )

    def __post_init__(self) -> None:
        check(self)
        if self.metrics_port == self.port > 0:
            raise ValueError(f"metrics_port: {self.metrics_port}; gRPC has that port (--metrics-port chooses another)")
        taken = [self.port, self.metrics_port]
        for name in ("http_port", "admin_port"):
            port = getattr(self, name)
            if port in taken and port > 0:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{name}: {port}; another purpose has that port ({flag} chooses another)")
            taken.append(port)
        self._check_access()
        if self.trace_endpoint and not _is_endpoint(self.trace_endpoint):
            raise ValueError(f"trace_endpoint: {self.trace_endpoint!r}; expected a URL such as http://collector:4317")
        if self.max_images_per_request > self.max_queue:
            raise ValueError(
                f"max_images_per_request: {self.max_images_per_request}; the queue holds only {self.max_queue} "
                "(max_queue), so such a request could never be taken"
            )

    def _check_access(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError(
                f"tls_cert and tls_key: {self.tls_cert!r} and {self.tls_key!r}; expected both files or neither"
            )
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("tls_client_ca: needs tls_cert and tls_key, since clients show certificates in TLS")
        if self.insecure or is_loopback(self.host):
            return
        if not (self.tls_cert or self.tokens):
            raise ValueError(
                f"host: {self.host!r}; others could call without TLS and tokens: give tls_cert and tls_key, or tokens, "
                "or allow it (--insecure)"
            )
        if self.admin_port >= 0 and not (self.tls_client_ca or self.tokens):
            raise ValueError(
                f"admin_port: {self.admin_port}; others could load and unload models on host {self.host!r}: give "
                "tokens or tls_client_ca, or allow it (--insecure)"
            )

    @property
    def repository(self) -> Path:
        return Path(self.models) if self.models else embedded_models()

    @property
    def only_model(self) -> str:
        """Return the name of the only model to serve, or "" for all of the repository."""
        return self.model or ("" if self.models else DEFAULT_MODEL)


def read(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings from command line, environment and file. A flag overrides its variable, and that the file.

    A wrong or unknown setting ends the process with a message, as in argparse.
    """
    parser = _parser()
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].partition("=")[0]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_suggestion(name, _flag)}")
    names = {_variable(setting): setting for setting in fields(Settings)}
    made_by_kubernetes = service_links(environment)
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        upper = variable.upper()
        if not upper.startswith(ENVIRONMENT_PREFIX) or variable in made_by_kubernetes:
            continue
        if variable in names:
            if text := text.strip():  # an empty variable counts as unset, as in compose files
                values[names[variable].name] = _value(parser, names[variable], variable, text)
        elif not upper.startswith(_OTHER_VARIABLES):
            parser.error(f"environment variable {variable} is no setting{_suggestion(upper, _variable)}")
    given = values | vars(flags)
    try:
        return Settings(**_from_file(str(given.get("settings_file", ""))) | given)
    except ValueError as error:
        parser.error(str(error))


def _from_file(path: str) -> dict[str, Any]:
    """Return the settings of a TOML file, none without one.

    Raises ValueError for a file that is not TOML, and for an unknown name or a value of another type in it.
    """
    if not path:
        return {}
    try:
        content = tomllib.loads(Path(path).read_bytes().decode())
    except OSError as error:
        raise ValueError(f"settings_file: {path!r} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of TOML or of UTF-8
        raise ValueError(f"settings_file: {path!r} is not TOML: {error}") from error
    known = {setting.name: setting for setting in fields(Settings) if setting.name != "settings_file"}
    for name, value in content.items():
        if name not in known:
            raise ValueError(f"settings_file: {name} is no setting{_suggestion(name, lambda setting: setting.name)}")
        expected = type(known[name].default)
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise ValueError(f"settings_file: {name}: {value!r}; expected {_TOML_TYPES[expected]}")
        if parse := option_of(known[name]).parse:
            content[name] = parse(str(value))
    return content


def service_links(environment: Mapping[str, str]) -> list[str]:
    """Return the variables that Kubernetes sets in every pod for a Service named capsnet.

    Its documentation calls them service links. ``CAPSNET_PORT=tcp://10.96.12.7:8001`` is one, and not a setting.
    """
    return sorted(
        name
        for name, text in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX)
        and (_SERVICE_LINK.search(name) or (name.endswith("_PORT") and _SERVICE_ADDRESS.match(text)))
    )


def _is_endpoint(url: str) -> bool:
    """Return True if a text is the URL of a collector of traces: http or https, a host, and perhaps a port."""
    try:
        parts = urlsplit(url)
        return (
            url.isprintable()
            and parts.scheme in ("http", "https")
            and bool(_HOST.fullmatch(parts.hostname or ""))
            and parts.port != 0
            and (parts.path in ("", "/") and not parts.query and not parts.fragment and "@" not in parts.netloc)
        )
    except ValueError:  # of a port or an address in brackets
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving",
        allow_abbrev=False,
        usage="%(prog)s [--models FOLDER] [--host ADDRESS] [--port N] [--http-port N] [--help] ...",
        description="Serve a capsule network over gRPC and HTTP, with Prometheus metrics.",
        epilog=f"Every setting is also an environment variable: --max-batch is {ENVIRONMENT_PREFIX}MAX_BATCH. "
        "A flag wins over its variable, and a variable over the settings file.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    add_version(parser)
    add_flags(parser, Settings)
    return parser


def _flag(setting: "Field[Any]") -> str:
    return "--" + setting.name.replace("_", "-")


def _variable(setting: "Field[Any]") -> str:
    return ENVIRONMENT_PREFIX + setting.name.upper()


def _value(parser: argparse.ArgumentParser, setting: "Field[Any]", variable: str, text: str) -> Any:
    if isinstance(setting.default, bool):
        if (value := _TRUTH.get(text.lower())) is None:
            parser.error(f"environment variable {variable}: {text!r}; expected 1 or 0")
        return value
    parse = option_of(setting).parse or cast(Callable[[str], Any], type(setting.default))
    try:
        return parse(text)
    except ValueError:
        parser.error(f"environment variable {variable}: {text!r} is not a number")


def _suggestion(name: str, spell: "Callable[[Field[Any]], str]") -> str:
    """Return the end of a message about an unknown name, with the nearest setting in its correct spelling."""
    plain = name.removeprefix(ENVIRONMENT_PREFIX).lstrip("-").lower().replace("-", "_")
    known = {setting.name: setting for setting in fields(Settings)}
    nearest = get_close_matches(plain, known, 1)
    return f"; did you mean {spell(known[nearest[0]])}?" if nearest else "; --help lists the settings"
