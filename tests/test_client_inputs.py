"""Tests of the inputs that the client takes as people have them, and of its words on what they give by mistake."""

import array
import asyncio
import base64
import copy
import ctypes
import gzip
import io
import json
import mmap
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from serving.client import (
    AsyncCapsNetClient,
    CapsNetClient,
    CapsNetError,
    InvalidImage,
    InvalidRequest,
    Unavailable,
    Unsupported,
)
from serving.client.addresses import target_of
from serving.client.arrays import to_uint8
from serving.client.errors import ItemError
from serving.files.images import MODES_BY_CHANNELS, to_pixels
from tests.conftest import DATA, Running
from tests.fake_server import FakeServer

PATH = DATA / "seven.png"
FILE = PATH.read_bytes()
SEVEN = np.asarray(Image.open(io.BytesIO(FILE)).convert("L"))
UPRIGHT = Image.fromarray(SEVEN)


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[CapsNetClient]:
    with CapsNetClient(running.address) as result:
        yield result


def _file(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


class Tensor:
    """An array of another library, which fails if it has an error."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        if self._error:
            raise self._error
        return SEVEN


class Capsule:
    """An array with the protocol DLPack alone."""

    def __dlpack__(self, **options: Any) -> Any:
        return SEVEN.copy().__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return SEVEN.__dlpack_device__()


class Interface:
    """An array with NumPy's older protocol alone."""

    def __init__(self) -> None:
        self._kept = SEVEN.copy()
        self.__array_interface__ = self._kept.__array_interface__


class Reader:
    """An open file that reads what a test gives, or raises it."""

    def __init__(self, content: Any) -> None:
        self._content = content

    def read(self) -> Any:
        if isinstance(self._content, Exception):
            raise self._content
        return self._content


class AsyncReader:
    async def read(self) -> bytes:
        return FILE


class OddPath:
    def __fspath__(self) -> str:
        raise RuntimeError("no path")


def _mapped() -> mmap.mmap:
    mapped = mmap.mmap(-1, len(FILE))
    mapped[:] = FILE
    return mapped


def _closed() -> io.BytesIO:
    file = io.BytesIO(FILE)
    file.close()
    return file


def _closed_image() -> Image.Image:
    with Image.open(io.BytesIO(FILE)) as image:
        return image


def _turned(kind: str) -> bytes:
    """Return the file of the seven, lying on its side, that asks to be turned upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return _file(UPRIGHT.transpose(Image.Transpose.ROTATE_90), kind, exif=exif)


def _decoded(file: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


TAKEN: dict[str, Callable[[], Any]] = {
    "BytesIO": lambda: io.BytesIO(FILE),
    "a reader": lambda: Reader(FILE),
    "a reader of a bytearray": lambda: Reader(bytearray(FILE)),
    "bytearray": lambda: bytearray(FILE),
    "memoryview": lambda: memoryview(FILE),
    "a memoryview of pixels": lambda: memoryview(SEVEN.tobytes()).cast("B", (28, 28)),
    "mmap": _mapped,
    "array.array": lambda: array.array("B", FILE),
    "ctypes": lambda: (ctypes.c_ubyte * len(FILE)).from_buffer_copy(FILE),
    "float32": lambda: SEVEN / np.float32(255),
    "float16": lambda: (SEVEN / 255).astype(np.float16),
    "float64": lambda: SEVEN / 255,
    "bool": lambda: SEVEN > 100,
    "int64": lambda: SEVEN.astype(np.int64),
    "big-endian uint16": lambda: SEVEN.astype(">u2"),
    "masked": lambda: np.ma.masked_array(SEVEN),
    "lists": SEVEN.tolist,
    "lists of floats": lambda: (SEVEN / 255).tolist(),
    "tuples": lambda: tuple(map(tuple, SEVEN.tolist())),
    "a list of lists": lambda: [SEVEN.tolist()],
    "__array__": Tensor,
    "__dlpack__": Capsule,
    "__array_interface__": Interface,
    "the bytes of a file as an array": lambda: np.frombuffer(FILE, np.uint8),
    "an array of paths": lambda: np.array([str(PATH)]),
    "an array of objects": lambda: np.array([PATH], object),
    "a set of paths": lambda: {PATH},
    **{kind: partial(_file, UPRIGHT, kind) for kind in ("GIF", "BMP", "TIFF", "PPM", "JPEG", "PNG")},
    "WebP": lambda: _file(UPRIGHT.convert("RGB"), "WEBP", lossless=True),
    "an animated GIF": lambda: _file(UPRIGHT, "GIF", save_all=True, append_images=[Image.new("L", (28, 28))]),
    **{f"a turned {kind}": partial(_turned, kind) for kind in ("TIFF", "PNG", "JPEG")},
    "a turned TIFF that was decoded": lambda: _decoded(_turned("TIFF")),
    "a TIFF of 16 bits": lambda: _file(Image.fromarray(SEVEN.astype(np.uint16) * 257), "TIFF"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_images_are_taken_in_the_form_in_which_people_have_them(client: CapsNetClient, name: str) -> None:
    [result] = client.classify(TAKEN[name]())
    assert result.label == "7"
    assert abs(result.probability - client.classify(SEVEN)[0].probability) < 0.05


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "base64": (lambda: base64.b64encode(FILE * 30).decode(), "10000 characters of base64; expected a path, or the byt"),
    "base64 as bytes": (lambda: base64.b64encode(FILE), "336 characters of base64"),
    "base64 in lines": (lambda: base64.encodebytes(FILE).decode(), "characters of base64"),
    "base64 for URLs": (lambda: base64.urlsafe_b64encode(_file(UPRIGHT, "JPEG")).decode(), "characters of base64"),
    "hexadecimal digits": (FILE.hex, r"500 hexadecimal digits; expected a path, or the bytes: bytes.fromhex\(text\)"),
    "the text of bytes": (lambda: repr(FILE), "the text of bytes; expected the bytes themselves"),
    "JSON": (lambda: '{"image": "7.png"}', "a text in JSON; expected a path"),
    "SVG": (lambda: "<svg xmlns='http://www.w3.org/2000/svg'></svg>", "an SVG drawing; expected a path"),
    "a pattern": (lambda: "tests/data/*.png", r"\*.png: no file, but a pattern; expected files, such as sorted\(glob"),
    "a home folder": (lambda: "~/7.png", r"~/7.png: no file, and ~ is not replaced; expected Path\(path\).expanduser"),
    "no name": (lambda: "", "an empty path; expected the path of a file"),
    "a gzipped PNG": (lambda: gzip.compress(FILE), r"a gzipped file without IDX in it; expected it unpacked: gzip"),
    "a dictionary": (lambda: {"image": PATH}, "dict; expected an array, or the path or bytes of an image file"),
    "a URL": (lambda: "https://example.org/7.png", r"https://example.org/7.png: a URL; expected a path, or the bytes"),
    "a URL as a path": (lambda: Path("https://example.org/7.png"), "a URL"),
    "a URL of a file": (lambda: "file:///tmp/7.png", "a URL"),
    "a data URL": (lambda: "data:image/png;base64," + base64.b64encode(FILE).decode(), "a data URL; expected its byte"),
    "the text of a file": (lambda: str(io.BytesIO()), "the text of an object; expected the object itself"),
    "a long text": (lambda: "x" * 5000, r"x{100}\.\.\.: File name too long"),
    "lines": (lambda: "one\ntwo\nthree", "a text of 13 characters; expected a path"),
    "a path as bytes": (lambda: str(PATH).encode(), "the bytes of a path; expected the path as str"),
    "a file of text": (lambda: io.StringIO("text"), "a file that was opened as text; expected one opened in binary mo"),
    "a closed file": (_closed, "an open file that cannot be read .*closed"),
    "a file at its end": (lambda: io.BytesIO(b""), r"an open file with no bytes left; file.seek\(0\)"),
    "a file that fails": (lambda: Reader(OSError("disk")), r"an open file that cannot be read \(disk\)"),
    "a file of numbers": (lambda: Reader(5), "an open file that gives int; expected bytes"),
    "an asynchronous file": (AsyncReader, "an asynchronous file; expected its bytes"),
    "a path that fails": (OddPath, r"OddPath; it cannot be read \(no path\)"),
    "a tensor on a GPU": (lambda: Tensor(TypeError("can't convert cuda:0")), r"Tensor; NumPy cannot .*\(can't convert"),
    "a closed image": (_closed_image, "an opened image whose file was closed before"),
    "a PDF": (lambda: b"%PDF-1.7", "a PDF file; expected an image: PNG, JPEG, GIF, BMP, WebP, TIFF, PPM or IDX"),
    "a photograph of a phone": (lambda: b"\0\0\0\x18ftypheic", "a HEIC photograph"),
    "an icon": (lambda: _file(UPRIGHT, "ICO"), "an icon; expected an image: PNG, JPEG, GIF, BMP, WebP"),
    "a JPEG 2000 image": (lambda: b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 image; expected an image: PNG, JPEG"),
    "a JPEG XL image": (lambda: b"\xff\x0a" + bytes(20), "a JPEG XL image; expected an image: PNG, JPEG"),
    "a file of Photoshop": (lambda: b"8BPS" + bytes(20), "a file of Photoshop; expected an image: PNG, JPEG"),
    "no bytes": (lambda: b"", "0 bytes; expected an image: PNG, JPEG, GIF, BMP, WebP, TIFF, PPM or IDX"),
    "an empty file": (lambda: "/dev/null", "0 bytes; expected an image: PNG, JPEG"),
    "a page": (lambda: b"<!DOCTYPE html><html>", "a page of HTML"),
    "a pointer of Git LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "a GIF that is cut off": (lambda: _file(UPRIGHT, "GIF")[:100], "not an image, or a damaged one"),
    "a large GIF": (lambda: _file(UPRIGHT.resize((56, 56)), "GIF"), r"56 x 56 pixels; .* \(resize=True scales it, p"),
    "a large PNG": (lambda: _file(UPRIGHT.resize((56, 56)), "PNG"), r"expected 28 x 28.* \(resize=True scales it, p"),
    "floats of 0 to 255": (lambda: SEVEN * 1.0, "float64 from 0 to 255; expected uint8 from 0 to 255, or floats from"),
    "floats that are none": (lambda: SEVEN * np.nan, "float64 from nan to nan"),
    "a mask of integers": (lambda: (SEVEN > 100).astype(int), r"int64 from 0 to 1; .*\(a mask: 255 \* images\)"),
    "complex numbers": (lambda: SEVEN * 1j, "an array of complex128; expected uint8"),
    "one number": (lambda: np.uint8(7), r"an array of shape \(\); capsnet-mnist takes"),
    "floats of Pillow": (lambda: UPRIGHT.convert("F"), "pixels in floating point, whose range is not known"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_short_line_and_ends_no_stream(client: CapsNetClient, name: str) -> None:
    make, text = MISTAKES[name]
    first, error, last = client.classify_stream([SEVEN, make(), SEVEN], errors="yield")
    assert isinstance(error, InvalidImage)
    with pytest.raises(InvalidImage, match=text):
        raise error
    assert (len(str(error)) < 240, "\n" in str(error), error.index) == (True, False, 1)
    assert [getattr(one, "label", one) for one in (first, last)] == ["7", "7"]


def test_no_mistake_ends_a_stream_with_asyncio(running: Running) -> None:
    async def main() -> list[str]:
        async with AsyncCapsNetClient(running.address) as client:
            items = [PATH, *(make() for make, _ in MISTAKES.values()), io.BytesIO(FILE)]
            return [getattr(one, "label", "-") async for one in client.classify_stream(items, errors="yield")]

    assert asyncio.run(main()) == ["7", *"-" * len(MISTAKES), "7"]


def test_a_picture_beyond_pillows_limit_is_told(client: CapsNetClient, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = _file(Image.new("L", (300, 100)), "JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(
        InvalidImage, match="an image of more than 20000 pixels, Pillow's limit; expected a smaller one"
    ):
        client.classify(photo, resize=True)


MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "I;16",
    "I;16B",
)


def _in_mode(mode: str) -> Image.Image:
    if mode.startswith("I;16"):
        return Image.frombytes(
            mode, (28, 28), (SEVEN * np.uint16(257)).astype(">u2" if "B" in mode else "<u2").tobytes()
        )
    if mode == "I":
        return Image.fromarray(SEVEN.astype(np.int32) * 257)
    if mode == "LAB":
        return Image.merge("LAB", [UPRIGHT, *[Image.new("L", (28, 28), 128)] * 2])
    by_way_of = {"La": "LA", "PA": "LA", "RGBa": "RGBA", "HSV": "RGB", "P": "RGB"}.get(mode)
    return (UPRIGHT.convert(by_way_of) if by_way_of else UPRIGHT).convert(mode)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_is_the_seven_that_its_file_is(client: CapsNetClient, mode: str) -> None:
    image = _in_mode(mode)
    assert client.classify(image)[0].label == "7"
    for channels, target in MODES_BY_CHANNELS.items():
        assert to_pixels(image, channels).shape == (len(target), 28, 28)


@pytest.mark.parametrize(
    "name", ["orientation", "orientation in XMP", "transparent grey", "transparent palette", "alpha"]
)
def test_the_properties_of_an_opened_image_are_obeyed_as_those_of_its_file(client: CapsNetClient, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta tiff:Orientation="6"/>')
    turned = UPRIGHT.transpose(Image.Transpose.ROTATE_90)
    clear = UPRIGHT.point(lambda value: value or 255).convert("LA")  # a white ground that nobody sees
    clear.putalpha(UPRIGHT.point(lambda value: 255 if value else 0))
    file = {
        "orientation": _file(turned, "PNG", exif=exif),
        "orientation in XMP": _file(turned, "PNG", pnginfo=info),
        "transparent grey": _file(UPRIGHT.point(lambda value: value or 200), "PNG", transparency=200),
        "transparent palette": _file(UPRIGHT.point(lambda value: value or 200).convert("P"), "PNG", transparency=200),
        "alpha": _file(clear, "PNG"),
    }[name]
    with Image.open(io.BytesIO(file)) as opened:
        results = client.classify([file, opened])
    assert [result.label for result in results] == ["7", "7"]
    assert np.allclose(results[0].probabilities, results[1].probabilities, atol=1e-5)


def test_floats_are_rounded_to_the_nearest_grey_level() -> None:
    levels = np.arange(256)
    assert (to_uint8(levels / 255) == levels).all()
    assert (to_uint8(levels.astype(np.int16)) == levels).all()
    assert to_uint8(np.zeros((0, 28, 28))).shape == (0, 28, 28)
    for wrong in (np.array([0.0, np.inf]), np.array([-1]), np.array(["7"]), np.array([1.001])):
        with pytest.raises(ItemError, match="expected uint8 from 0 to 255, or floats from 0 to 1"):
            to_uint8(wrong)


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("host:9", "host:9"),
        ("host", "host:8001"),
        ("grpc://host", "host:8001"),
        ("HTTP://host:9/", "host:9"),
        ("tcp://10.0.0.1:9", "10.0.0.1:9"),
        (" host:9\n", "host:9"),
        ("[::1]", "[::1]:8001"),
        ("[::1]:9", "[::1]:9"),
        ("dns:///host", "dns:///host:8001"),
        ("dns:host:9", "dns:host:9"),
        ("dns://10.0.0.1/host:9", "dns://10.0.0.1/host:9"),
        ("ipv4:10.0.0.1:9,10.0.0.2:9", "ipv4:10.0.0.1:9,10.0.0.2:9"),
        ("unix:///run/capsnet", "unix:///run/capsnet"),
        ("host:9/", "host:9"),
        ("ipv6:[::1]:9,[::2]", "ipv6:[::1]:9,[::2]"),
        ("/run/capsnet", "unix:/run/capsnet"),
    ],
)
def test_an_address_has_a_scheme_and_a_port_or_not(address: str, target: str) -> None:
    assert target_of(address, tls=False) == target


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (" ", "address: empty; expected HOST:PORT or unix:PATH"),
        ("https://host", "address: https://host; expected tls=True or certificates with this scheme"),
        ("ftp://host", "with grpc:// or nothing before it"),
        ("::1", "expected brackets around an IPv6 address"),
        ("fe80::1%eth0", "expected brackets around an IPv6 address"),
        ("tcp:10.0.0.1:9", "with grpc:// or nothing before it"),
        ("grpc+tls://host:9", "with grpc:// or nothing before it"),
        ("//host:9", "without a path"),
        ("unix://run/capsnet", "expected unix:PATH or unix:///PATH"),
        ("ipv4:host:9", "expected ipv4: and IP addresses with commas between them"),
        ("ipv6:::x", "expected ipv6: and IP addresses with commas between them"),
        ("10.0.0.1,9", "with a host"),
        ("10.0.0.1\uff1a9", "with a host"),
        (("10.0.0.1", 9), "expected HOST:PORT"),
        ("host:", "expected a port from 1 to 65535"),
        ("host:http", "expected a port from 1 to 65535"),
        ("host:70000", "expected a port from 1 to 65535"),
        ("host:0", "expected a port from 1 to 65535"),
        (":9", "with a host"),
        ("two hosts", "with a host"),
        ("http://host:9/v2/models", "without a path"),
        ("http://me:secret@host", "without a user and a password"),
        (8001, "address: 8001; expected HOST:PORT"),
        (None, "address: None; expected HOST:PORT"),
    ],
)
def test_an_address_that_is_none_is_told_in_one_line(address: Any, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text) as raised:
        CapsNetClient(address)
    assert "secret" not in str(raised.value)


def test_an_address_with_a_scheme_is_served(running: Running) -> None:
    for address in (f"grpc://{running.address}", f"http://{running.address}/"):
        with CapsNetClient(address) as client:
            assert client.classify(PATH)[0].label == "7"
    assert target_of("https://host", tls=True) == "host:8001"


def test_a_port_of_http_and_a_server_without_tls_are_told(running: Running) -> None:
    for port in (running.server.metrics_port, running.server.http_port):
        with (
            CapsNetClient(f"127.0.0.1:{port}", retries=0) as client,
            pytest.raises(Unavailable, match="an HTTP server"),
        ):
            client.classify(PATH)
    with CapsNetClient(running.address, tls=True, retries=0) as client, pytest.raises(Unavailable, match="TLS fails"):
        client.classify(PATH)


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("nowhere.invalid:9", r"nowhere.invalid:9: no host of this name is found \(.+\)$"),
        ("127.0.0.1:1", r"127.0.0.1:1: no server answers there \(Connection refused\)$"),
        ("unix:/nowhere", r"unix:/nowhere: no server answers there \(No such file or directory\)$"),
    ],
)
def test_an_address_where_nobody_answers_is_told_in_few_words(address: str, text: str) -> None:
    with CapsNetClient(address, retries=0, timeout=20) as client, pytest.raises(Unavailable, match=text):
        client.classify(PATH)


def test_the_administration_port_names_the_other_port(start: Callable[..., Running]) -> None:
    port = start(admin_port=0).server.admin_port
    text = "not on this port, which loads and unloads models; the server's --port has this method"
    with CapsNetClient(f"127.0.0.1:{port}", retries=0) as client, pytest.raises(Unsupported, match=text):
        client.classify(PATH)


def test_a_server_of_another_kind_is_told() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with (
        CapsNetClient(f"127.0.0.1:{port}", retries=0) as client,
        pytest.raises(Unsupported, match="lacks this method: it is of another kind, or older than this client"),
    ):
        client.classify(PATH)
    server.stop(None)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"version": 1.5}, "version: 1.5; expected printable text"),
        ({"model": None}, "model: None; expected printable text"),
        ({"model": "\udce9"}, "model: .*expected printable text"),
        ({"timeout": "5"}, "timeout: '5'; expected seconds above 0, or None"),
        ({"timeout": float("nan")}, "timeout: nan"),
        ({"retries": -1}, "retries: -1"),
        ({"retries": 1.5}, "retries: 1.5; expected 0 to 4"),
        ({"token": 5}, "token: int; expected a text, or a function that returns one"),
        ({"tls": "/none.pem"}, "tls: /none.pem: No such file or directory"),
        ({"tls": PATH}, "tls: nothing in PEM is in .*seven.png; expected -----BEGIN "),
        ({"tls": b""}, "tls: nothing in PEM is in the bytes"),
        ({"tls": True, "client_certificate": (b"",)}, "client_certificate: expected two, the chain and the private"),
        ({"tls": True, "client_certificate": PATH}, "client_certificate: expected two"),
        ({"tls": True, "client_certificate": (PATH, None)}, "client_certificate: nothing in PEM"),
    ],
)
def test_settings_of_a_wrong_type_are_told(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        CapsNetClient(**settings)


def test_a_version_may_be_a_number(running: Running) -> None:
    with CapsNetClient(running.address, version=1) as client:
        assert client.classify(PATH)[0].model_version == "1"


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.classify_stream([], errors="ignore"),
        lambda client: client.classify_stream([], window="many"),
        lambda client: client.classify(SEVEN, preprocess=True),
        lambda client: client.classify(SEVEN, resize=True, preprocess="auto"),
        lambda client: client.classify({"image": PATH}),
        lambda client: client.explain(SEVEN, parts=["routes"]),
        lambda client: client.explain(SEVEN, parts=5),
        lambda client: client.explain(SEVEN, parts=[["routing"]]),
        lambda client: client.explain(SEVEN, classes=[]),
        lambda client: client.explain(SEVEN, classes=[-1]),
        lambda client: client.explain(SEVEN, classes=[None]),
        lambda client: client.explain(SEVEN, classes=7.0),
        lambda client: client.reconstruct(),
        lambda client: client.reconstruct(SEVEN, changes={"a": 1}),
        lambda client: client.reconstruct(SEVEN, changes={1: "a"}),
        lambda client: client.reconstruct(SEVEN, changes={1: float("nan")}),
        lambda client: client.reconstruct(SEVEN, changes=[(1, 1)]),
        lambda client: client.reconstruct(SEVEN, sweep=5),
        lambda client: client.reconstruct(SEVEN, sweep=(1, 0, 1)),
        lambda client: client.reconstruct(SEVEN, sweep=(1, 0, 1, 2.5)),
        lambda client: client.reconstruct(poses={"7": "pose"}),
        lambda client: client.reconstruct(poses={"7": [[1]]}),
        lambda client: client.reconstruct(poses=5),
        lambda client: client.reconstruct(poses=[]),
        lambda client: client.reconstruct(poses=[1, 2]),
    ],
)
def test_wrong_options_of_a_call_are_errors_of_the_client(client: CapsNetClient, call: Callable[..., Any]) -> None:
    with pytest.raises(InvalidRequest) as raised:
        call(client)
    assert (len(str(raised.value)) < 240, "\n" in str(raised.value)) == (True, False)


def test_a_client_is_not_copied(client: CapsNetClient) -> None:
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="has connections, which cannot be copied; make one in each process"):
            copied(client)


@pytest.mark.parametrize("token", ["", lambda: ""])
def test_an_empty_token_is_told(running: Running, token: Any) -> None:
    with CapsNetClient(running.address, token=token) as client, pytest.raises(InvalidRequest, match="token: empty"):
        client.classify(PATH)


@pytest.mark.parametrize("token", ["secret\n", "geheim€", lambda: None])
def test_a_token_that_no_header_takes_is_told_without_it(running: Running, token: Any) -> None:
    with (
        CapsNetClient(running.address, token=token) as client,
        pytest.raises(InvalidRequest, match=r"^token: it has characters that no header takes") as raised,
    ):
        client.classify(PATH)
    assert "secret" not in str(raised.value)


def test_a_closed_client_says_so_in_every_call(running: Running) -> None:
    client = CapsNetClient(running.address)
    client.classify(PATH)
    client.close()
    client.close()
    calls: list[Callable[[], Any]] = [
        lambda: client.classify(PATH),
        lambda: list(client.classify_stream([PATH])),
        lambda: client.explain(PATH),
        lambda: client.reconstruct(PATH),
        lambda: client.get_model(refresh=True),
        lambda: client.wait_until_ready(1),
    ]
    for call in calls:
        with pytest.raises(CapsNetError, match="the client is closed"):
            call()


def test_a_client_for_asyncio_goes_on_in_the_next_loop_and_names_another_one(running: Running) -> None:
    client = AsyncCapsNetClient(running.address)
    errors: list[BaseException] = []

    async def ask() -> str:
        return (await client.classify(PATH))[0].label

    def ask_in_thread() -> None:
        try:
            asyncio.run(ask())
        except CapsNetError as error:
            errors.append(error)

    async def both() -> None:
        assert await ask() == "7"
        thread = threading.Thread(target=ask_in_thread)
        thread.start()
        await asyncio.to_thread(thread.join)

    assert [asyncio.run(ask()) for _ in range(3)] == ["7"] * 3
    asyncio.run(both())
    assert [str(error).partition(": ")[2] for error in errors] == [
        "the client belongs to another event loop; expected one client a loop"
    ]
    asyncio.run(client.close())
    with pytest.raises(CapsNetError, match="the client is closed"):
        asyncio.run(ask())


def test_results_go_through_json(client: CapsNetClient) -> None:
    [result] = client.classify(PATH)
    numbers = json.loads(json.dumps(result.to_dict()))
    assert (numbers["label"], numbers["class_index"], numbers["probability"]) == ("7", 7, result.probability)
    assert numbers["probabilities"]["7"] == result.probability
    assert numbers["poses"]["7"] == result.pose.tolist()
    model = json.loads(json.dumps(client.get_model().to_dict()))
    assert (model["name"], model["image_shape"]) == ("capsnet-mnist", [1, 28, 28])
    if client.get_model().reconstructs:
        [drawn] = client.reconstruct(PATH)
        assert json.loads(json.dumps(drawn.to_dict()))["image"] == drawn.image.tolist()
    if client.get_model().primary_capsules:
        [explanation] = client.explain(PATH, parts=["contributions"])
        assert json.loads(json.dumps(explanation.to_dict()))["classes"][0]["label"] == "7"


def test_an_answer_with_an_unknown_class_is_a_fault_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeServer() as server, CapsNetClient(server.address) as client:
        assert client.get_model().labels == ("a", "b")
        from tests import fake_server

        whole = fake_server.answer

        def wrong(*arguments: Any) -> Any:
            response = whole(*arguments)
            response.results[0].class_index = 9
            return response

        monkeypatch.setattr(fake_server, "answer", wrong)
        with pytest.raises(CapsNetError, match="a class_index beyond the 2 classes"):
            client.classify(fake_server.numbered(1))
