"""The command ``python -m serving.client``: its options, and the results for each file.

It takes image files of the model's size, or of any size with ``--preprocess auto``, and IDX files of images (MNIST's
format, gzipped or not); folders and patterns of these; and one file on the standard input.
"""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, get_args

from PIL import Image
from tqdm import tqdm

from serving.client.addresses import is_local, target_of
from serving.client.errors import CapsNetError, Unavailable
from serving.client.found_files import Found, found_files
from serving.client.inputs import Preprocess
from serving.client.listed_files import ListedFiles
from serving.client.looking import Looking
from serving.client.reconstructions import Sweep
from serving.client.reports import Report
from serving.client.results import Classification
from serving.client.scores import TrueLabels
from serving.client.sync import CapsNetClient
from serving.files.program import add_version, command_of, parse_flags, parse_path

_PROGRESS_DELAY_SECONDS = 0.5  # a shorter run shows no progress bar


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number above 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r}; expected seconds above 0")
    return seconds


def _labels(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _change(text: str) -> tuple[int, float]:
    try:
        dimension, delta = text.split(":")
        return int(dimension), float(delta)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected DIM:DELTA, such as 3:0.1") from None


def _sweep(text: str) -> Sweep:
    try:
        dimension, first, last, steps = text.split(":")
        return Sweep(int(dimension), float(first), float(last), int(steps))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected DIM:FIRST:LAST:STEPS, such as 3:-0.2:0.2:7") from None


def _add_looking(target: argparse.ArgumentParser) -> None:
    """Add the options that look inside an answer."""
    group = target.add_argument_group("look inside", "Draw in the terminal and, with --out, write PNG files.")
    group.add_argument("--explain", action="store_true", help="the routing, the contributions and the relevance map")
    group.add_argument("--reconstruct", action="store_true", help="the image that the network's decoder draws")
    group.add_argument(
        "--classes", type=_labels, metavar="LABEL,...", help="classes to show (default: those that the model finds)"
    )
    group.add_argument(
        "--change",
        type=_change,
        action="append",
        metavar="DIM:DELTA",
        help="add DELTA to a dimension of the pose before it is drawn; may be repeated",
    )
    group.add_argument(
        "--sweep",
        type=_sweep,
        metavar="DIM:FIRST:LAST:STEPS",
        help="draw a row of images: numbers from FIRST to LAST are added to a dimension of the pose",
    )
    group.add_argument(
        "--out", type=parse_path, metavar="FOLDER", help="folder for PNG files; no file there is overwritten"
    )


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m serving.client",
        allow_abbrev=False,
        usage="%(prog)s [--address HOST:PORT] [--preprocess auto | --resize] [--json] [--help] ... FILE [FILE ...]",
        description="Classify images with a running server: the length of each class's capsule, the winner's pose, and "
        "what lies behind them.",
    )
    add_version(result)
    result.add_argument(
        "files",
        nargs="+",
        type=parse_path,
        metavar="FILE",
        help="image or IDX file, folder, pattern such as '*.png', or - for the standard input",
    )
    result.add_argument(
        "--address", default="127.0.0.1:8001", help="HOST:PORT of the server, or unix:PATH (default: %(default)s)"
    )
    result.add_argument("--model", default="", metavar="NAME", help="model to ask (default: the server's only one)")
    result.add_argument("--model-version", default="", metavar="N", help="version to ask (default: the highest)")
    result.add_argument("--json", action="store_true", help="one JSON object a line for each image")
    result.add_argument(
        "--labels",
        metavar="FILE",
        help="true labels, to count the right answers: a file with a label or NAME,LABEL a line, an IDX file, or the "
        "word folders for the names of the images' folders",
    )
    fitting = result.add_mutually_exclusive_group()
    fitting.add_argument("--resize", action="store_true", help="scale image files to the model's size first")
    fitting.add_argument(
        "--preprocess",
        choices=get_args(Preprocess),
        default="none",
        help="auto: find the object in image files of any size, such as photographs of paper, and bring it to the look "
        "of the training images (default: %(default)s)",
    )
    result.add_argument("--limit", type=_count, metavar="N", help="stop after N images")
    result.add_argument(
        "--timeout",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="time limit for all images (default: %(default)s)",
    )
    result.add_argument("--tls", action="store_true", help="encrypt, and trust the well-known certificates")
    result.add_argument(
        "--ca-file", type=parse_path, metavar="FILE", help="encrypt, and trust these certificates (PEM)"
    )
    result.add_argument("--cert-file", type=parse_path, metavar="FILE", help="certificate to show to the server (PEM)")
    result.add_argument("--key-file", type=parse_path, metavar="FILE", help="private key of that certificate (PEM)")
    result.add_argument(
        "--token-file", type=parse_path, metavar="FILE", help="file with the token to show to the server"
    )
    _add_looking(result)
    return result


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line. Exits if they contradict each other."""
    target = parser()
    options = parse_flags(target, arguments)
    if options.labels is not None and (options.explain or options.reconstruct):
        target.error("--labels: with --explain or --reconstruct; expected one of them")
    for name, needed in (("classes", "explain"), ("out", "explain"), ("change", ""), ("sweep", "")):
        if getattr(options, name) is not None and not (options.reconstruct or (needed and options.explain)):
            target.error(f"--{name} needs {'--explain or ' if needed else ''}--reconstruct")
    dimensions = [dimension for dimension, _ in options.change or ()]
    if len(dimensions) > len(set(dimensions)):
        target.error(f"--change: a dimension of {dimensions} stands twice; expected each once")
    return options


def _client(options: argparse.Namespace) -> CapsNetClient:
    """Return a client with these options.

    Raises ValueError if options contradict each other, and OSError if a file cannot be read.
    """
    if (options.cert_file is None) != (options.key_file is None):
        raise ValueError("--cert-file and --key-file: one without the other; expected both or neither")
    return CapsNetClient(
        options.address,
        model=options.model,
        version=options.model_version,
        timeout=options.timeout,
        token=options.token_file.read_text().strip() if options.token_file else None,
        tls=options.ca_file or options.tls,
        client_certificate=(options.cert_file, options.key_file) if options.cert_file else None,
    )


def _classify(client: CapsNetClient, options: argparse.Namespace, files: ListedFiles, report: Report) -> None:
    """Report a result or an error for each image."""
    outcomes = client.classify_stream(
        files, errors="yield", resize=options.resize, preprocess=options.preprocess, timeout=options.timeout
    )
    for outcome in outcomes:
        place = files.next_place()
        if not isinstance(outcome, Classification):
            files.tell_error(place, outcome)
            continue
        report.add(place, outcome)
        files.tell_done()
    files.tell_unreadable()


def _run(
    client: CapsNetClient,
    options: argparse.Namespace,
    found: Sequence[Found],
    labels: TrueLabels | None,
    progress: "tqdm[Any]",
) -> bool:
    """Print a result or an error for each image. Return True if every image has a result."""
    bar = "█" if (sys.stdout.encoding or "ascii").lower().startswith("utf") else "#"
    files = ListedFiles(found, options.limit, progress)
    if options.explain or options.reconstruct:
        Looking(client, options, bar).look(files)
    else:
        report = Report(options.json, labels, bar, options.preprocess == "auto")
        try:
            _classify(client, options, files, report)
        finally:
            report.end(files.failures)
    return not files.failures


def _prepare_output() -> None:
    """Let the output take every file's name, and vanish where the caller has closed it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w")))
        elif isinstance(stream, io.TextIOWrapper):  # its encoding may lack characters of a name
            stream.reconfigure(errors="backslashreplace")


def run_command(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return 0, or 1 if an image was not classified."""
    _prepare_output()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the user's own files; larger ones are refused
    options = _parse(arguments)
    # Results that go to the same terminal show the progress already.
    shown = sys.stderr.isatty() and not sys.stdout.isatty()
    try:
        found = found_files(options.files)
        total = len(found) if options.limit is None else min(options.limit, len(found))
        labels = None if options.labels is None else TrueLabels.read(options.labels)
        with (
            _client(options) as client,
            tqdm(
                total=total, unit=" images", delay=_PROGRESS_DELAY_SECONDS, leave=False, disable=not shown
            ) as progress,
        ):
            return 0 if _run(client, options, found, labels, progress) else 1
    except Unavailable as error:
        hint = (
            f"; start one with: {command_of('serving')}"
            if is_local(target_of(options.address, tls=True)) and not (options.tls or options.ca_file)
            else ""
        )
        print(f"{error}{hint}", file=sys.stderr)
    except CapsNetError as error:
        print(error, file=sys.stderr)
    except BrokenPipeError:  # the reader of our output, such as head, has closed it
        sys.stderr.close()
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"python -m serving.client: {place}{error.strerror or error}", file=sys.stderr)
    except ValueError as error:
        print(f"python -m serving.client: {error}", file=sys.stderr)
    return 1
