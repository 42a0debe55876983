"""``python -m serving.client FILE...``: classify images with a running server.

Takes PNG and JPEG files of the model's size, and IDX files of images (MNIST's format, gzipped or not).
"""

import argparse
import io
import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from PIL import Image

from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.capsnet.v1.capsnet_pb2_grpc import CapsNetServiceStub
from serving.idx import GZIP_MAGIC, is_idx, read_idx
from serving.images import to_pixels

_CHUNK = 64  # images of an IDX file in one request
_BAR = 30  # characters of a probability of 1


@dataclass(frozen=True)
class _Batch:
    """Images that go in one request, and what to call each."""

    names: list[str]
    images: list[pb.Image]


def _batches(paths: Sequence[Path], limit: int | None, model: pb.GetModelResponse | None) -> Iterator[_Batch | str]:
    """The files' images, up to ``limit`` in all; a text in place of a file that cannot be read.

    PNG and JPEG files are sent as they are, or, where a model is given, scaled to its size.
    """
    left = limit if limit is not None else sys.maxsize
    for path in paths:
        if left <= 0:
            return
        try:
            data = path.read_bytes()
            if not (is_idx(data[:4]) or data.startswith(GZIP_MAGIC)):
                yield _Batch([str(path)], [_scaled(data, model) if model else pb.Image(encoded=data)])
                left -= 1
                continue
            images = read_idx(data)
        except (OSError, ValueError) as error:
            yield f"{path}: {getattr(error, 'strerror', None) or error}"
            continue
        if images.ndim < 3:
            yield f"{path}: an IDX file of labels or single values; expected one of images"
            continue
        images = images[:left]
        left -= len(images)
        for start in range(0, len(images), _CHUNK):
            chunk = images[start : start + _CHUNK]
            names = [f"{path}[{start + offset}]" for offset in range(len(chunk))]
            yield _Batch(names, [pb.Image(pixels=image.tobytes()) for image in chunk])


def _scaled(data: bytes, model: pb.GetModelResponse) -> pb.Image:
    """Raises ValueError where the data is no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            size = (model.image_width, model.image_height)
            return pb.Image(pixels=to_pixels(image, model.image_channels, size).tobytes())
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise ValueError("not an image, or a damaged one") from error


def _answers(
    stub: CapsNetServiceStub, batches: Iterator[_Batch | str], timeout: float
) -> Iterator[tuple[str, pb.ClassifyResponse | None, int, str]]:
    """(name, response, index in the response, "") for each image in order, or (name, None, 0, error)."""
    sent: deque[_Batch | str] = deque()

    def requests() -> Iterator[pb.ClassifyStreamRequest]:
        for number, batch in enumerate(batches):
            sent.append(batch)
            if isinstance(batch, _Batch):
                yield pb.ClassifyStreamRequest(id=str(number), request=pb.ClassifyRequest(images=batch.images))

    def unreadable() -> Iterator[tuple[str, None, int, str]]:
        while sent and isinstance(sent[0], str):
            yield "", None, 0, str(sent.popleft())

    for answer in stub.ClassifyStream(requests(), timeout=timeout, wait_for_ready=False):
        yield from unreadable()
        batch = sent.popleft()
        assert isinstance(batch, _Batch)
        for index, name in enumerate(batch.names):
            if answer.WhichOneof("result") == "error":
                yield name, None, 0, answer.error.message
            else:
                yield name, answer.response, index, ""
    yield from unreadable()


def _as_text(name: str, result: pb.Classification, bar: str) -> str:
    width = max(len(capsule.label) for capsule in result.capsules)
    lines = [f"{name}: {result.label}"]
    for capsule in result.capsules:
        length = round(_BAR * min(1.0, max(0.0, capsule.probability)))
        lines.append(f"  {capsule.label:>{width}} {bar * length:<{_BAR}} {capsule.probability:.3f}")
    pose = [f"{value:+.2f}" for value in result.capsules[result.class_index].pose]
    rows = [" ".join(pose[start : start + 8]) for start in range(0, len(pose), 8)]
    return "\n".join([*lines, f"  pose of {result.label}:", *(f"    {row}" for row in rows)])


def _as_json(name: str, response: pb.ClassifyResponse, result: pb.Classification) -> str:
    return json.dumps(
        {
            "image": name,
            "label": result.label,
            "class_index": result.class_index,
            "probabilities": {capsule.label: capsule.probability for capsule in result.capsules},
            "poses": {capsule.label: list(capsule.pose) for capsule in result.capsules},
            "model_name": response.model_name,
            "model_version": response.model_version,
        }
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number above 0")
    return int(text)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m serving.client",
        description="Classify images with a running server: the probability of each class, and the winner's pose.",
    )
    result.add_argument("files", nargs="+", type=Path, metavar="FILE", help="PNG, JPEG or IDX file")
    result.add_argument("--address", default="127.0.0.1:8001", help="HOST:PORT of the server (default: %(default)s)")
    result.add_argument("--json", action="store_true", help="one JSON object a line for each image")
    result.add_argument("--resize", action="store_true", help="scale image files to the model's size first")
    result.add_argument("--limit", type=_count, metavar="N", help="stop after N images")
    result.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="most time for all (default: %(default)s)"
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 if an image was not classified."""
    options = parser().parse_args(arguments)
    encoding = sys.stdout.encoding or "ascii"
    bar = "█" if encoding.lower().startswith("utf") else "#"
    failed = False
    with grpc.insecure_channel(options.address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            model = stub.GetModel(pb.GetModelRequest(), timeout=options.timeout) if options.resize else None
            batches = _batches(options.files, options.limit, model)
            for name, response, index, error in _answers(stub, batches, options.timeout):
                if response is None:
                    failed = True
                    print(f"{name}: {error}" if name else error, file=sys.stderr)
                elif options.json:
                    print(_as_json(name, response, response.results[index]))
                else:
                    print(_as_text(name, response.results[index], bar))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                print(f"{options.address}: no server answers there; start one with: python -m serving", file=sys.stderr)
            else:
                print(f"{options.address}: {error.code().name}: {error.details()}", file=sys.stderr)
            return 1
        except BrokenPipeError:  # the reader of our output, such as head, has seen enough
            sys.stderr.close()
            return 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
