"""``python -m serving.client FILE...``: classify images with a running server.

It takes PNG and JPEG files of the model's size, or of any size with ``--preprocess auto``, and IDX files of images
(MNIST's format, gzipped or not).
"""

import argparse
import io
import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from serving.client.channel import is_local
from serving.client.errors import CapsNetError, InvalidRequest, Unavailable
from serving.client.inputs import ItemError, Preprocess, parse
from serving.client.results import Classification
from serving.client.sync import CapsNetClient

_BAR_CHARACTERS = 30  # the bar of a probability of 1
_PROGRESS_DELAY_SECONDS = 0.5  # a shorter run shows no progress bar
_INTERRUPTED_EXIT_CODE = 130  # a shell's exit code for a process that SIGINT ended


@dataclass(frozen=True)
class _Place:
    """The name under which a result is shown.

    error: why the file could not be read; such a file gets no result. Empty for an image that was sent.
    """

    name: str
    error: str = ""


class _Files:
    """An iterable of the files' images, at most ``limit`` in all.

    places: the name or the error of each item, in order. The caller removes one for each result.
    """

    def __init__(self, paths: Sequence[Path], limit: int | None, progress: "tqdm[Any]") -> None:
        self._paths = paths
        self._left = sys.maxsize if limit is None else limit
        self._progress = progress
        self._limit = self._left
        self.places: deque[_Place] = deque()

    def __iter__(self) -> Iterator[bytes | NDArray[np.uint8]]:
        for path in self._paths:
            if self._left <= 0:
                return
            try:
                content = parse(path.read_bytes())
            except (OSError, ItemError) as error:
                self.places.append(_Place(str(path), getattr(error, "strerror", None) or str(error)))
                continue
            if isinstance(content, bytes):
                self._left -= 1
                self.places.append(_Place(str(path)))
                yield content
                continue
            assert isinstance(content, np.ndarray)
            images = content[: self._left]
            self._left -= len(images)
            self._progress.total = min(self._limit, (self._progress.total or 0) + len(images) - 1)
            for index, image in enumerate(images):
                self.places.append(_Place(f"{path}[{index}]"))
                yield image


def _as_text(name: str, result: Classification, bar: str) -> str:
    width = max(len(label) for label in result.labels)
    lines = [f"{name}: {result.label}"]
    for label, probability in zip(result.labels, result.probabilities.tolist(), strict=True):
        length = round(_BAR_CHARACTERS * min(1.0, max(0.0, probability)))
        lines.append(f"  {label:>{width}} {bar * length:<{_BAR_CHARACTERS}} {probability:.3f}")
    pose = [f"{value:+.2f}" for value in result.pose.tolist()]
    rows = [" ".join(pose[start : start + 8]) for start in range(0, len(pose), 8)]
    return "\n".join([*lines, f"  pose of {result.label}:", *(f"    {row}" for row in rows)])


def _as_json(name: str, result: Classification) -> str:
    return json.dumps(
        {
            "image": name,
            "label": result.label,
            "class_index": result.class_index,
            "probabilities": dict(zip(result.labels, result.probabilities.tolist(), strict=True)),
            "poses": dict(zip(result.labels, result.poses.tolist(), strict=True)),
            "model_name": result.model_name,
            "model_version": result.model_version,
        }
    )


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


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m serving.client",
        description="Classify images with a running server: the probability of each class, and the winner's pose.",
    )
    result.add_argument("files", nargs="+", type=Path, metavar="FILE", help="PNG, JPEG or IDX file")
    result.add_argument(
        "--address", default="127.0.0.1:8001", help="HOST:PORT of the server, or unix:PATH (default: %(default)s)"
    )
    result.add_argument("--model", default="", metavar="NAME", help="model to ask (default: the server's only one)")
    result.add_argument("--model-version", default="", metavar="N", help="version to ask (default: the highest)")
    result.add_argument("--json", action="store_true", help="one JSON object a line for each image")
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
    result.add_argument("--ca-file", type=Path, metavar="FILE", help="encrypt, and trust these certificates (PEM)")
    result.add_argument("--cert-file", type=Path, metavar="FILE", help="certificate to show to the server (PEM)")
    result.add_argument("--key-file", type=Path, metavar="FILE", help="private key of that certificate (PEM)")
    result.add_argument("--token-file", type=Path, metavar="FILE", help="file with the token to show to the server")
    return result


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


def _classify(client: CapsNetClient, options: argparse.Namespace, progress: "tqdm[Any]") -> bool:
    """Print a result or an error for each image. Return True if every image has a result."""
    bar = "█" if (sys.stdout.encoding or "ascii").lower().startswith("utf") else "#"
    files = _Files(options.files, options.limit, progress)
    all_well = True

    def tell(place: _Place, error: str) -> None:
        nonlocal all_well
        all_well = False
        with progress.external_write_mode(file=sys.stderr):
            print(f"{place.name}: {error}", file=sys.stderr)
        progress.update()

    def tell_unreadable() -> None:
        while files.places and files.places[0].error:
            place = files.places.popleft()
            tell(place, place.error)

    outcomes = client.classify_stream(
        files, errors="yield", resize=options.resize, preprocess=options.preprocess, timeout=options.timeout
    )
    for outcome in outcomes:
        tell_unreadable()
        place = files.places.popleft()
        if isinstance(outcome, Classification):
            print(_as_json(place.name, outcome) if options.json else _as_text(place.name, outcome, bar))
            progress.update()
        else:
            tell(place, outcome.reason if isinstance(outcome, InvalidRequest) else str(outcome))
    tell_unreadable()
    return all_well


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 if an image was not classified, or 130 after an interrupt."""
    for stream in (sys.stdout, sys.stderr):  # its encoding may lack characters of a file's name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = parser().parse_args(arguments)
    # Results that go to the same terminal show the progress already.
    shown = sys.stderr.isatty() and not sys.stdout.isatty()
    total = len(options.files) if options.limit is None else min(options.limit, len(options.files))
    try:
        with (
            _client(options) as client,
            tqdm(
                total=total, unit=" images", delay=_PROGRESS_DELAY_SECONDS, leave=False, disable=not shown
            ) as progress,
        ):
            return 0 if _classify(client, options, progress) else 1
    except Unavailable as error:
        hint = (
            "; start one with: python -m serving"
            if is_local(options.address) and not (options.tls or options.ca_file)
            else ""
        )
        print(f"{error}{hint}", file=sys.stderr)
    except CapsNetError as error:
        print(error, file=sys.stderr)
    except BrokenPipeError:  # the reader of our output, such as head, has closed it
        sys.stderr.close()
    except (ValueError, OSError) as error:
        print(f"python -m serving.client: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED_EXIT_CODE
    return 1


if __name__ == "__main__":
    sys.exit(main())
