"""Tests of the preparation of pictures: what becomes of them, and what the served networks answer then."""

import asyncio
import base64
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, strategies
from hypothesis import settings as search
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.capsnet.v1.capsnet_pb2_grpc import CapsNetServiceStub
from serving.artifact import Preparation, load, write_manifest
from serving.client import AsyncCapsNetClient, CapsNetClient, InvalidImage
from serving.client.__main__ import main
from serving.files.image_headers import read_header
from serving.files.images import UnknownRange, to_pixels
from serving.files.preparation import drafted_size, prepare, shrink
from serving.server import Server
from serving.services.encoded_images import RefusedImage, file_bytes, from_picture, picture_bytes
from tests.conftest import DATA, ROOT, Digits, InThread, Running, settings
from tests.photographs import photograph
from tests.web_client import ask, form

Images = NDArray[np.uint8]

NAMES = ("capsnet-mnist", "capsnet-mnist-accurate")
MNIST = Preparation("bright-on-dark", 20, True)
ON_PAPER = Preparation("dark-on-bright", 20, True)
SHAPE = (1, 28, 28)
HAND_DRAWN = sorted(path for path in (DATA / "handwritten").iterdir() if path.suffix in (".jpg", ".png"))
#: The digits that are photographed. ``EXAMPLES=1000 python -m pytest tests/test_preparation.py`` takes as many, and
#: larger photographs.
PHOTOGRAPHS = int(os.environ.get("EXAMPLES", "100"))
LARGEST = 20.0 if "EXAMPLES" in os.environ else 8.0
#: The largest file and the most pixels, as the server's settings have them by default.
LIMITS = (2**23, 2**23)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of both networks, whose artifacts say how MNIST looks."""
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        copy = shutil.copytree(ROOT / "models" / name / "1", folder / name / "1")
        write_manifest(replace(load(copy), preparation=MNIST))
    thread = InThread(Server(settings(models=folder, http_port=0)))
    with thread as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield Running(server, CapsNetServiceStub(channel), channel, thread)  # type: ignore[no-untyped-call]


@pytest.fixture(params=NAMES)
def client(request: pytest.FixtureRequest, prepared: Running) -> Iterator[CapsNetClient]:
    with CapsNetClient(prepared.address, model=request.param) as result:
        yield result


def _file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _prepared(image: Image.Image, look: Preparation = MNIST) -> Images:
    (grey,) = prepare(image, SHAPE, look)
    return np.asarray(grey, np.uint8)


def _three(size: tuple[int, int] = (300, 400), width: int = 14) -> Image.Image:
    """Return a dark 3 on white paper, not in its middle."""
    sheet = Image.new("L", size, 255)
    pen = ImageDraw.Draw(sheet)
    pen.arc((60, 60, 160, 160), 180, 90, fill=20, width=width)
    pen.arc((60, 146, 160, 246), 270, 180, fill=20, width=width)
    return sheet


def _centre_of_mass(image: Images) -> tuple[float, float]:
    weights = image / image.sum()
    places = np.arange(28) + 0.5
    return float(weights.sum(axis=1) @ places), float(weights.sum(axis=0) @ places)


def _extent(image: Images) -> int:
    """Return the longer side of the box around all bright pixels."""
    return max(int(np.ptp(places)) + 1 for places in np.nonzero(image > 40))


def _alike(one: Images, other: Images) -> bool:
    return float(np.abs(one.astype(int) - other.astype(int)).mean()) < 4


def test_a_dark_digit_on_paper_becomes_a_bright_one_of_mnists_size_and_place() -> None:
    image = _prepared(_three())
    assert image.max() == 255
    assert (image[:2] == 0).all() and (image[:, :2] == 0).all()
    assert 19 <= _extent(image) <= 21
    assert max(abs(place - 14) for place in _centre_of_mass(image)) < 0.8


def test_both_polarities_give_the_same_image() -> None:
    assert _alike(_prepared(ImageOps.invert(_three())), _prepared(_three()))


def test_a_model_of_dark_objects_gets_dark_ones() -> None:
    assert (_prepared(_three(), ON_PAPER) == 255 - _prepared(_three())).all()


def test_a_model_without_a_polarity_gets_that_of_the_picture() -> None:
    either = Preparation("", 20, True)
    assert (_prepared(_three(), either) == 255 - _prepared(_three())).all()
    assert _prepared(ImageOps.invert(_three()), either)[0, 0] == 0


def test_an_object_may_be_centred_by_its_box() -> None:
    image = _prepared(_three(), Preparation("bright-on-dark", 20, False))
    rows, columns = np.nonzero(image > 40)
    assert abs(int(rows.min() + rows.max()) - 27) <= 1
    assert abs(int(columns.min() + columns.max()) - 27) <= 1


def test_specks_and_the_sheets_edges_are_left_out() -> None:
    sheet = _three()
    pen = ImageDraw.Draw(sheet)
    pen.ellipse((250, 20, 256, 26), fill=0)
    pen.ellipse((20, 350, 25, 355), fill=0)
    pen.rectangle((0, 390, 300, 400), fill=60)
    assert _alike(_prepared(sheet), _prepared(_three()))


def test_two_digits_side_by_side_are_both_kept() -> None:
    sheet = Image.new("L", (600, 400), 240)
    sheet.paste(_three(), (0, 0))
    sheet.paste(_three(), (300, 60))
    image = _prepared(sheet)
    assert 19 <= _extent(image) <= 21
    left, right = (float((half > 128).sum()) for half in (image[:, :14], image[:, 14:]))
    assert min(left, right) > 0.7 * max(left, right)


def test_a_gradient_and_a_shadow_change_little() -> None:
    light = np.linspace(1, 0.5, 300)[np.newaxis] * np.where(np.arange(400) > 320, 0.7, 1)[:, np.newaxis]
    sheet = Image.fromarray((np.asarray(_three()) * light).astype(np.uint8))
    assert _alike(_prepared(sheet), _prepared(_three()))


def test_thin_strokes_of_a_large_sheet_do_not_vanish() -> None:
    thin = _three((2000, 2600), width=2)
    image = _prepared(thin)
    assert image.max() == 255
    assert (image > 128).sum() > 40


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_exif_is_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _file(_three(), "JPEG", exif=exif, quality=95)
    with Image.open(io.BytesIO(data)) as turned:
        expected = _prepared(ImageOps.exif_transpose(turned))
    assert _alike(from_picture(data, SHAPE, MNIST, "f", *LIMITS)[0], expected)


def _transparent(ink: int) -> Image.Image:
    strokes = ImageOps.invert(_three())
    return Image.merge("LA", (Image.new("L", strokes.size, ink), strokes))


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "colours": lambda: ImageOps.colorize(_three(), (20, 30, 120), (240, 235, 210)),
    "a palette": lambda: _three().convert("P"),
    "two levels": lambda: _three().convert("1", dither=Image.Dither.NONE),
    "16 bits": lambda: Image.fromarray(np.asarray(_three()).astype(np.uint16) * 257),
    "dark strokes on a transparent sheet": lambda: _transparent(0),
    "bright strokes on a transparent sheet": lambda: _transparent(255),
    "a transparent palette": lambda: _transparent(10).convert("RGBA").quantize(16),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_of_any_mode_gives_the_same_image(name: str) -> None:
    data = _file(PICTURES[name]())
    assert _alike(from_picture(data, SHAPE, MNIST, "f", *LIMITS)[0], _prepared(_three()))


def test_transparent_corners_of_a_photograph_take_its_ground() -> None:
    mask = Image.new("L", (300, 400))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 299, 399), 80, fill=255)
    assert _alike(_prepared(Image.merge("LA", (_three(), mask))), _prepared(_three()))


def test_a_blank_picture_stays_blank() -> None:
    rng = np.random.default_rng(0)
    light = 230 * np.linspace(1, 0.7, 400)[:, np.newaxis] * np.ones(300)
    noisy = Image.fromarray((light + rng.normal(0, 3, light.shape)).astype(np.uint8))
    blanks = [Image.new("L", (300, 400), grey) for grey in (0, 128, 255)]
    for blank in (*blanks, noisy, Image.new("RGBA", (50, 50)), Image.new("1", (1, 1))):
        assert len(np.unique(_prepared(blank))) == 1
        assert len(np.unique(_prepared(blank, ON_PAPER))) == 1


def test_a_picture_for_a_model_of_whole_images_keeps_its_aspect_and_its_colours() -> None:
    photo = Image.new("RGB", (400, 200), (200, 30, 60))
    photo.paste((10, 200, 90), (150, 50, 250, 150))
    image = prepare(photo, (3, 32, 32), Preparation())
    assert image.shape == (3, 32, 32)
    assert image[:, 0, 0].tolist() == image[:, 31, 31].tolist() == [200, 30, 60]
    assert image[:, 16, 16].tolist() == [10, 200, 90]
    assert image[1, 16].tolist() == image[1, 15].tolist()
    inverted = prepare(photo, (3, 32, 32), Preparation("bright-on-dark" if photo.getpixel((0, 0)) else ""))
    assert inverted.shape == (3, 32, 32)


def test_a_whole_image_gets_the_models_polarity() -> None:
    shirt = Image.new("L", (280, 280), 250)
    shirt.paste(60, (60, 40, 220, 240))
    assert prepare(shirt, SHAPE, Preparation("bright-on-dark"))[0, 0, 0] == 5
    assert prepare(shirt, SHAPE, Preparation("dark-on-bright"))[0, 0, 0] == 250
    assert prepare(shirt, SHAPE, Preparation())[0, 0, 0] == 250


def test_a_file_above_a_limit_is_refused_by_its_header() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 0, 0, 0, 0)
    huge = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    text = r"10000 x 10000 pixels; the limit is 8388608 in all \(max_picture_pixels\)"
    with pytest.raises(RefusedImage, match=text) as caught:
        from_picture(huge, SHAPE, MNIST, "f", *LIMITS)
    assert caught.value.cause == "size"
    assert picture_bytes(huge, LIMITS[1]) == picture_bytes(b"no picture", LIMITS[1]) == 0
    with pytest.raises(RefusedImage, match=r"the limit is 99 bytes \(max_image_bytes\)"):
        from_picture(_file(_three()), SHAPE, MNIST, "f", 99, LIMITS[1])


def test_a_large_jpeg_with_many_scans_is_refused() -> None:
    data = _file(Image.new("L", (3000, 2500)), "JPEG")
    with pytest.raises(RefusedImage, match="a JPEG file of 41 scans; the limit is 35 of this size") as caught:
        from_picture(data[:-2] + 40 * b"\xff\xda\0\2" + data[-2:], SHAPE, MNIST, "f", *LIMITS)
    assert caught.value.cause == "parts"


def test_a_film_after_a_photograph_is_no_scan() -> None:
    data = _file(Image.new("L", (3000, 2500)), "JPEG")
    assert from_picture(data + 1000 * b"\xff\xda\0\2", SHAPE, MNIST, "f", *LIMITS).shape == SHAPE


@pytest.fixture(scope="module")
def phone_photo() -> bytes:
    """A photograph of a dark 3 as a phone writes it: 12 million pixels in 2 MB, to be turned upright."""
    sheet = _three().resize((3000, 4000))
    noise = Image.effect_noise((1500, 2000), 40).resize(sheet.size)
    turned = Image.blend(sheet, noise, 0.15).transpose(Image.Transpose.ROTATE_90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    return _file(turned, "JPEG", quality=90, exif=exif)


def test_a_phones_photograph_is_decoded_at_a_reduced_size_and_upright(phone_photo: bytes) -> None:
    assert 2**20 < len(phone_photo) < LIMITS[0]
    assert drafted_size((4000, 3000)) == (1000, 750)
    assert drafted_size((8160, 6120)) == (1020, 765)  # 50 million pixels
    [image] = from_picture(phone_photo, SHAPE, MNIST, "f", LIMITS[0], 1000 * 750)
    assert _alike(image, _prepared(_three()))
    with Image.open(io.BytesIO(phone_photo)) as opened:
        opened.draft("L", (384, 384))
        assert opened.size == drafted_size((4000, 3000))
    before_pixels = phone_photo.index(b"\xff\xda")
    rest = 24 * 2**20 + 16 * (1000 + 750) + 3 * before_pixels
    assert picture_bytes(phone_photo, LIMITS[1]) == 4 * 1000 * 750 + rest < 2**25
    with pytest.raises(RefusedImage, match="750000 of them decoded; the limit is 749999"):
        from_picture(phone_photo, SHAPE, MNIST, "f", LIMITS[0], 1000 * 750 - 1)


def test_what_a_decoder_keeps_of_a_jpeg_file_of_several_scans_is_reserved() -> None:
    image = Image.new("RGB", (4000, 3000))
    plain, progressive = (_file(image, "JPEG", progressive=kind) for kind in (False, True))
    more = 3 * (progressive.index(b"\xff\xda") - plain.index(b"\xff\xda"))
    coefficients = 250 * 188 * 16 * 16 * 3 // 2  # of 16 x 16 pixels each, in which two components have one of four
    assert picture_bytes(progressive, LIMITS[1]) == picture_bytes(plain, LIMITS[1]) + 2 * coefficients + more
    apart = _first_component_alone(plain)
    assert picture_bytes(apart, LIMITS[1]) == picture_bytes(plain, LIMITS[1]) + 2 * coefficients
    whole = _file(image, "JPEG", progressive=True, subsampling=0)
    assert picture_bytes(whole, LIMITS[1]) > picture_bytes(plain, LIMITS[1]) + 2 * 3 * 11_000_000


def _first_component_alone(data: bytes) -> bytes:
    """Return a JPEG file of three components whose first scan is said to have one."""
    scan = data.index(b"\xff\xda")
    return data[: scan + 4] + b"\1" + data[scan + 5 :]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        ((8200, 8200), "a JPEG image of 8200 x 8200 pixels; the limit is 67108864 in all"),
        ((65000, 300), r"a JPEG image of 65000 x 300 pixels; the limit is 8388608 in all \(max_picture_pixels\)"),
        ((0, 300), "a JPEG image of 0 x 300 pixels; the limit"),
    ],
)
def test_a_jpeg_bomb_is_refused_by_its_header(size: tuple[int, int], text: str) -> None:
    data = _file(Image.new("L", (8, 8)), "JPEG")
    frame = data.index(b"\xff\xc0") + 5
    bomb = data[:frame] + struct.pack(">HH", size[1], size[0]) + data[frame + 4 :]
    with pytest.raises(RefusedImage, match=text):
        from_picture(bomb, SHAPE, MNIST, "f", *LIMITS)
    assert picture_bytes(bomb, LIMITS[1]) == 0


def test_a_lossless_jpeg_file_cannot_be_decoded_at_a_reduced_size_and_is_refused() -> None:
    data = _file(Image.new("L", (1000, 1000)), "JPEG")
    with pytest.raises(RefusedImage, match="that is lossless or hierarchical") as caught:
        from_picture(data.replace(b"\xff\xc0", b"\xff\xc3"), SHAPE, MNIST, "f", *LIMITS)
    assert caught.value.cause == "format"


def test_a_phones_photograph_is_answered_in_every_way(prepared: Running, phone_photo: bytes) -> None:
    port, infer = prepared.server.http_port, f"/v2/models/{NAMES[0]}/infer"
    picture = pb.Image(encoded=phone_photo, preprocess=pb.PREPROCESS_AUTO)
    request = pb.ClassifyRequest(model_name=NAMES[0], images=[picture])
    expected = [one.probability for one in prepared.stub.Classify(request, timeout=20).results[0].capsules]
    query = f"/v1/classify?model_name={NAMES[0]}&preprocess=auto"
    body, kind = form(("image", phone_photo))
    tensor: dict[str, Any] = {"name": "images", "datatype": "BYTES", "shape": [1]}
    named = {"preprocess": "auto"}
    encoded = {**tensor, "parameters": {**named, "content_type": "base64"}}
    encoded["data"] = [base64.b64encode(phone_photo).decode()]
    raw = struct.pack("<I", len(phone_photo)) + phone_photo
    header = json.dumps({"inputs": [{**tensor, "parameters": {**named, "binary_data_size": len(raw)}}]}).encode()
    in_json = {"model_name": NAMES[0], "images": [{"encoded": encoded["data"][0], "preprocess": "PREPROCESS_AUTO"}]}
    answers = [
        ask(port, query, body, content_type=kind),
        ask(port, query, phone_photo, content_type="application/x-www-form-urlencoded"),  # as curl --data-binary
        ask(port, "/v1/classify", json.dumps(in_json).encode(), content_type="application/json"),
        ask(port, infer, json.dumps({"inputs": [encoded]}).encode()),
        ask(port, infer, header + raw, inference_header_content_length=str(len(header))),
    ]
    assert [answer.status for answer in answers] == [200] * 5
    for answer in answers[:3]:
        [found] = answer.json["results"]
        assert found["label"] == "3"
        assert [one["probability"] for one in found["capsules"]] == pytest.approx(expected, abs=1e-6)
    for answer in answers[3:]:
        [lengths] = [one["data"] for one in answer.json["outputs"] if one["name"] == "probabilities"]
        assert lengths == pytest.approx(expected, abs=1e-6)


def test_the_memory_of_a_picture_is_reserved_by_the_size_in_its_header() -> None:
    small, large = (picture_bytes(_file(Image.new("L", size)), LIMITS[1]) for size in ((100, 10), (1000, 1000)))
    assert large - small == 4 * (1_000_000 - 1000) + 16 * (2000 - 110)


def test_copies_of_a_large_files_other_parts_are_reserved() -> None:
    image, exif = Image.new("L", (100, 100)), Image.Exif()
    exif[0x010E] = "x" * 60_000
    data = {kind: _file(image, kind, exif=exif) for kind in ("PNG", "JPEG")}
    assert [file_bytes(one) for one in data.values()] == [0, 0], "they are small"
    large = {kind: one + bytes(2**16) for kind, one in data.items()}
    assert file_bytes(large["JPEG"]) == 3 * read_header(large["JPEG"]).other_bytes > 180_000
    assert file_bytes(large["PNG"]) == 3 * read_header(large["PNG"]).other_bytes + len(large["PNG"]) > 240_000
    assert file_bytes(bytes(2**17)) == 0, "it is refused"


def test_pixels_of_an_unknown_range_are_refused() -> None:
    with pytest.raises(UnknownRange):
        _prepared(Image.new("F", (30, 30)))


@search(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=60)),
    strategies.sampled_from(["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "I;16"]),
    strategies.sampled_from([(1, 28, 28), (3, 32, 32), (1, 5, 40), (1, 1, 1)]),
    strategies.builds(
        Preparation,
        strategies.sampled_from(["bright-on-dark", "dark-on-bright", ""]),
        strategies.sampled_from([0, 1, 20, 64]),
        strategies.booleans(),
    ),
)
def test_any_picture_gives_an_image_of_the_models_shape(
    pixels: Images, mode: str, shape: tuple[int, int, int], look: Preparation
) -> None:
    image = Image.fromarray(pixels)
    image = Image.fromarray(pixels.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    result = prepare(image, shape, look)
    assert result.shape == shape
    assert result.dtype == np.uint8


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3), (900, 7), (769, 769)])
def test_pictures_of_any_size_are_prepared(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0]), np.uint8))
    for shape, look in ((SHAPE, MNIST), ((3, 32, 32), Preparation())):
        assert prepare(image, shape, look).shape == shape


def test_a_shrunk_picture_is_prepared_alike() -> None:
    large = _three().resize((1500, 2000))
    small = shrink(large.copy())
    assert max(small.size) < 768
    assert _alike(_prepared(small), _prepared(large))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_large_picture_is_reduced_in_strips_as_it_would_be_at_once(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    colours = np.random.default_rng(1).integers(0, 256, (801, 903, 4), np.uint8)
    grey = Image.fromarray(colours).convert("L")
    if mode == "I;16":
        image, whole = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256), grey
    else:
        image = Image.fromarray(colours).convert(mode)
        if mode == "P":
            image.info["transparency"] = 3
        whole = image.convert({"1": "L", "L": "L", "RGB": "RGB", "CMYK": "RGB"}.get(mode, "RGBA"))
    largest = 0
    convert = Image.Image.convert

    def measured(self: Image.Image, *arguments: object, **options: object) -> Image.Image:
        nonlocal largest
        largest = max(largest, self.width * self.height)
        return convert(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "convert", measured)
    reduced = shrink(image)
    assert largest <= 2**18, "no copy of the whole in another mode"
    monkeypatch.undo()
    assert np.array_equal(np.asarray(reduced), np.asarray(whole.reduce(2)))


def test_a_digit_of_mnist_hardly_changes_by_preparation(prepared: Running, digits: Digits) -> None:
    images, labels = digits.images[:1000], digits.labels[:1000]
    again = np.stack([_prepared(Image.fromarray(image)) for image in images])
    assert np.abs(again.astype(int) - images).mean() < 0.5
    with CapsNetClient(prepared.address, model=NAMES[0]) as client:
        answers = [np.array([one.class_index for one in client.classify(kind)]) for kind in (images, again)]
    plain, prepared_again = (float((answer == labels).mean()) for answer in answers)
    assert abs(plain - prepared_again) <= 0.003


def test_hand_drawn_digits_are_answered_right_by_both_networks(client: CapsNetClient) -> None:
    drawn = "".join(path.name[0] for path in HAND_DRAWN)
    assert drawn == "".join(2 * digit for digit in "0123456789")
    answers = "".join(result.label for result in client.classify(HAND_DRAWN, preprocess="auto"))
    assert sum(map(str.__eq__, answers, drawn)) >= 18, answers
    scaled = "".join(result.label for result in client.classify(HAND_DRAWN, resize=True))
    assert sum(map(str.__eq__, scaled, drawn)) <= 5, scaled  # which shows that the preparation matters


@pytest.fixture(scope="module")
def photographs(digits: Digits) -> list[bytes]:
    """Photographs of the first of MNIST's test digits, as files."""
    rng = np.random.default_rng(5)
    return [_file(photograph(image, rng, rng.uniform(5, LARGEST)), "JPEG") for image in digits.images[:PHOTOGRAPHS]]


def test_photographs_of_mnists_digits_are_answered_right(
    client: CapsNetClient, photographs: list[bytes], digits: Digits
) -> None:
    answers = [result.class_index for result in client.classify_stream(photographs, preprocess="auto")]
    assert float((np.array(answers) == digits.labels[:PHOTOGRAPHS]).mean()) >= 0.97


@pytest.fixture(scope="module")
def large() -> tuple[Image.Image, bytes]:
    """A photograph of many pixels, and a file of another one that is larger than what may be sent."""
    image = Image.open(DATA / "handwritten" / "3a.jpg").resize((3200, 4800))
    noisy = Image.effect_noise(image.size, 30)
    return image, _file(Image.blend(image.convert("L"), noisy, 0.2), "PNG", compress_level=1)


def test_an_opened_image_and_a_large_file_are_shrunk_and_prepared(
    client: CapsNetClient, large: tuple[Image.Image, bytes]
) -> None:
    image, file = large
    assert len(file) > LIMITS[0]
    assert [result.label for result in client.classify([image, file], preprocess="auto")] == ["3", "3"]
    with pytest.raises(InvalidImage, match="not an image, or a damaged one"):
        client.classify(b"no picture", preprocess="auto")


def test_the_asynchronous_client_asks_for_preparation_too(prepared: Running) -> None:
    async def ask() -> list[str]:
        async with AsyncCapsNetClient(prepared.address, model=NAMES[0]) as client:
            path = DATA / "handwritten" / "3a.jpg"
            with Image.open(path) as image:
                answers = await client.classify([path, path.read_bytes(), image], preprocess="auto")
            streamed = [one async for one in client.classify_stream([path], preprocess="auto")]
        return [result.label for result in answers + streamed]

    assert asyncio.run(ask()) == ["3"] * 4


def test_wrong_options_of_a_call_are_refused(client: CapsNetClient) -> None:
    with pytest.raises(ValueError, match="preprocess: 'all'; expected 'none' or 'auto'"):
        client.classify([], preprocess="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="resize and preprocess='auto': both"):
        client.classify([], resize=True, preprocess="auto")


def test_the_command_prepares_pictures(prepared: Running, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(DATA / "handwritten" / "8b.jpg")
    options = ["--address", prepared.address, "--model", NAMES[0]]
    assert main([path, *options, "--preprocess", "auto"]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: 8\n")
    assert main([path, *options]) == 1
    expected = (
        f"{path}: a JPEG image of 480 x 480 pixels; expected 28 x 28 (--resize scales it, --preprocess auto finds"
    )
    assert capsys.readouterr().err.startswith(expected)


def _refusal(prepared: Running, *images: pb.Image) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        prepared.stub.Classify(pb.ClassifyRequest(model_name=NAMES[0], images=images), timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return caught.value.details() or ""


def test_pixels_are_not_prepared(prepared: Running) -> None:
    plain, auto = (pb.Image(pixels=bytes(784), preprocess=kind) for kind in (pb.PREPROCESS_NONE, pb.PREPROCESS_AUTO))
    encoded = pb.Image(encoded=HAND_DRAWN[0].read_bytes(), preprocess=pb.PREPROCESS_AUTO)
    expected = "expected PREPROCESS_NONE, or a PNG or JPEG file in encoded"
    text = f"images[1].preprocess: PREPROCESS_AUTO for raw pixels; {expected}"
    assert _refusal(prepared, plain, auto) == text
    assert _refusal(prepared, encoded, auto) == text


def test_an_unknown_preparation_is_refused(prepared: Running) -> None:
    known = "expected one of PREPROCESS_UNSPECIFIED, PREPROCESS_NONE, PREPROCESS_AUTO"
    odd: pb.Preprocess = 7  # type: ignore[assignment]
    for content in ({"pixels": bytes(784)}, {"encoded": HAND_DRAWN[0].read_bytes()}):
        image = pb.Image(preprocess=odd, **content)
        assert _refusal(prepared, image) == f"images[0].preprocess: 7; {known}"


def test_memory_for_a_large_picture_must_be_there(start: Callable[..., Running]) -> None:
    limited = start(max_image_memory=2**24)
    picture = pb.Image(encoded=_file(Image.new("L", (1000, 1000))), preprocess=pb.PREPROCESS_AUTO)
    expected = 784 * (1 + 32) + 4_000_000 + 16 * 2000 + 24 * 2**20
    text = f"images: decoding takes {expected} bytes of memory; the limit is 16777216 bytes (max_image_memory)"
    with pytest.raises(grpc.RpcError) as caught:
        limited.classify(picture)
    assert caught.value.details() == text


def test_a_stored_image_without_preparation_is_read_as_before() -> None:
    path: Path = DATA / "seven.png"
    with Image.open(path) as image:
        pixels = to_pixels(image, 1)
    assert _alike(from_picture(path.read_bytes(), SHAPE, MNIST, "f", *LIMITS)[0], pixels[0])
