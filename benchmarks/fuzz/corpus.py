"""The targets, the inputs that are kept for each, and the making of new ones without atheris."""

import random
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.fuzz import file_targets, looking_targets, request_targets, transport_targets
from benchmarks.fuzz.target import Target

CORPUS = Path(__file__).parent / "corpus"
TARGETS: Mapping[str, Target] = {
    target.name: target
    for module in (transport_targets, request_targets, looking_targets, file_targets)
    for target in module.TARGETS
}
#: The longest input.
MAX_BYTES = 4096
_NUMBERS = (0, 1, 2, 127, 128, 255, 256, 16383, 16384, 65535, 2**31 - 1, 2**31, 2**32 - 1)
_MAX_CHANGES = 8


def kept(target: Target) -> dict[str, bytes]:
    """Return the inputs of a target by name: its seeds, and the files of its folder."""
    folder = CORPUS / target.name
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}
    return {f"seed {number}": seed for number, seed in enumerate(target.seeds())} | files


def mutations(inputs: list[bytes], generator: random.Random) -> Iterator[bytes]:
    """Yield changed inputs, without end."""
    while True:
        data = bytearray(generator.choice(inputs))
        for _ in range(generator.randint(1, _MAX_CHANGES)):
            _change(data, inputs, generator)
        yield bytes(data[:MAX_BYTES])


def _change(data: bytearray, inputs: list[bytes], generator: random.Random) -> None:
    """Change some bytes of an input."""
    at = generator.randint(0, len(data))
    size = min(len(data) - at, generator.choice((1, 1, 2, 4, 8, 32)))
    match generator.randrange(7):
        case 0:
            data[at : at + 1] = bytes((generator.randrange(256),))
        case 1:
            if data:
                data[at % len(data)] ^= 1 << generator.randrange(8)
        case 2:
            del data[at : at + size]
        case 3:
            data[at:at] = generator.randbytes(size)
        case 4:
            data[at:at] = data[at : at + size] * generator.choice((1, 2, 50))
        case 5:
            number = struct.pack(">I", generator.choice(_NUMBERS))[generator.choice((0, 2, 3)) :]
            data[at : at + len(number)] = number if generator.random() < 0.5 else number[::-1]
        case _:
            other = generator.choice(inputs)
            begin = generator.randint(0, len(other))
            data[at : at + size] = other[begin : begin + generator.choice((4, 16, 64, 256))]
