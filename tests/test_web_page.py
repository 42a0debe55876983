"""Tests of the page, in a headless Chromium."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf import json_format
from PIL import Image

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.server import Server
from tests.calibrated import MNIST
from tests.conftest import DATA, ROOT, InThread, settings
from tests.test_four_ways import Requests, answers_of, assert_same

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")
HANDWRITTEN = ROOT / "tests" / "data" / "handwritten" / "3a.jpg"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE = 30_000  # milliseconds
WIDTH, HEIGHT = 1280, 900

Points = Sequence[tuple[float, float]]
# Strokes as shares of the sheet.
THREE: Points = (
    (0.33, 0.25), (0.42, 0.18), (0.55, 0.18), (0.63, 0.27), (0.58, 0.40), (0.45, 0.47), (0.60, 0.52), (0.66, 0.65),
    (0.58, 0.80), (0.42, 0.83), (0.32, 0.75),
)  # fmt: skip
FIVE: Points = (
    (0.66, 0.20), (0.40, 0.20), (0.37, 0.48), (0.52, 0.44), (0.66, 0.55), (0.64, 0.72), (0.50, 0.83), (0.34, 0.78),
)  # fmt: skip

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of all models."""
    with InThread(Server(settings(models=str(ROOT / "models"), model="", http_port=0))) as running:
        yield running


@pytest.fixture
def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.http_port}/"


@pytest.fixture
def page(browser: "Browser", address: str) -> "Iterator[Page]":
    """The page, which must load nothing from elsewhere and log no error."""
    errors: list[str] = []
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT})
    context.set_default_timeout(PATIENCE)
    opened = context.new_page()
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda request: None if request.url.startswith(address) else errors.append(request.url))
    opened.goto(address)
    opened.wait_for_selector("#model:enabled")
    yield opened
    context.close()
    assert not errors


def choose(page: "Page", model: str) -> None:
    page.select_option("#model", label=f"{model} 1")


def draw(page: "Page", points: Points, shift: tuple[float, float] = (0.0, 0.0)) -> None:
    box = page.locator("#canvas").bounding_box()
    assert box
    places = [(box["x"] + (x + shift[0]) * box["width"], box["y"] + (y + shift[1]) * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()


def wait_for_verdict(page: "Page", pattern: str) -> None:
    from playwright.sync_api import expect

    expect(page.locator("#verdict")).to_have_text(re.compile(pattern), timeout=PATIENCE)


def ink(page: "Page", canvas: str) -> int:
    """Return the sum of the brightness of a canvas, or of the opacity of the overlay."""
    channel = 3 if canvas == "#overlay" else 0
    script = """([name, channel]) => { const canvas = document.querySelector(name);
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return data.reduce((sum, value, index) => index % 4 === channel ? sum + value : sum, 0); }"""
    return int(page.evaluate(script, [canvas, channel]))


def wait_for_ink(page: "Page", canvas: str, other_than: int = 0) -> int:
    for _ in range(PATIENCE // 50):
        if page.locator(canvas).count() and (now := ink(page, canvas)) != other_than:
            return now
        page.wait_for_timeout(50)
    raise AssertionError(f"{canvas} did not change")


def test_a_drawn_digit_is_answered_and_its_pose_can_be_turned(page: "Page") -> None:
    choose(page, "capsnet-mnist")
    draw(page, THREE)
    wait_for_verdict(page, "It is 3")
    assert float(page.locator("#bars li").nth(3).locator(".number").inner_text()) > 0.5
    wait_for_ink(page, "#overlay")
    before = wait_for_ink(page, "#pictures canvas")
    slider = page.get_by_label("Dimension 3 of the pose")
    slider.focus()
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    after = wait_for_ink(page, "#pictures canvas", before)
    page.click("#reset")
    assert wait_for_ink(page, "#pictures canvas", after)


def test_the_keyboard_draws_too(page: "Page") -> None:
    choose(page, "capsnet-mnist")
    page.focus("#canvas")
    for key, count in (("ArrowUp", 13), (" ", 1), ("ArrowDown", 26), (" ", 1)):
        for _ in range(count):
            page.keyboard.press(key)
    wait_for_verdict(page, "1")
    page.keyboard.press("Delete")
    wait_for_verdict(page, "Nothing drawn")


def test_pictures_of_other_things_are_no_digit(page: "Page") -> None:
    choose(page, "capsnet-mnist")
    for name, verdict in (("noise", "None of these"), ("a blank", "blank"), ("a 7", "It is 7"), ("on paper", "3")):
        page.locator("#shelf button", has_text=name).first.click()
        wait_for_verdict(page, verdict)


def test_two_digits_over_each_other_are_both_found_and_drawn(page: "Page") -> None:
    choose(page, "capsnet-multimnist")
    draw(page, THREE, (-0.06, 0.0))
    page.check("input[name=layer][value='1']")
    draw(page, FIVE, (0.08, 0.04))
    wait_for_verdict(page, "(3 and 5|5 and 3) together")
    assert page.locator("#pictures figure").count() == 3, "each digit, and both"


def test_a_network_of_pairs_tells_how_much_confidence_one_digit_can_have(page: "Page") -> None:
    choose(page, "capsnet-multimnist")
    draw(page, THREE)
    wait_for_verdict(page, "It is 3")
    detail = page.locator("#detail").inner_text()
    assert re.match(
        r"Confidence (49\.\d|50\.0) % of at most 50\.0 %, since this network takes an image to show 2 ", detail
    )


@pytest.mark.parametrize("width", [360, 768, WIDTH])
def test_nothing_is_wider_than_the_screen(page: "Page", width: int) -> None:
    page.set_viewport_size({"width": width, "height": 740})
    draw(page, THREE)
    wait_for_verdict(page, ".")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_each_control_has_a_name_for_screen_readers(page: "Page") -> None:
    choose(page, "capsnet-mnist")
    draw(page, THREE)
    wait_for_verdict(page, "It is 3")
    names = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, canvas[role]")].map((control) =>
            control.ariaLabel || control.textContent.trim() || control.labels?.[0]?.textContent.trim() || "")"""
    )
    assert len(names) > 20 and all(names)


def test_a_picture_can_be_opened(page: "Page") -> None:
    choose(page, "capsnet-mnist")
    page.set_input_files("#file", HANDWRITTEN)
    wait_for_verdict(page, "3")


def test_a_large_photograph_is_made_small_before_it_is_sent(page: "Page", tmp_path: Path) -> None:
    photograph = Image.open(HANDWRITTEN).resize((4000, 3000))
    photograph.save(tmp_path / "large.png", compress_level=0)
    assert (tmp_path / "large.png").stat().st_size > settings().max_image_bytes
    choose(page, "capsnet-mnist")
    page.set_input_files("#file", tmp_path / "large.png")
    wait_for_verdict(page, "3")


def test_what_is_no_picture_is_told(page: "Page", tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    page.set_input_files("#file", tmp_path / "text.png")
    page.wait_for_selector("#notice:not([hidden])")
    assert "cannot read this picture" in page.locator("#notice").inner_text()


def test_the_page_gets_the_numbers_of_grpc(page: "Page", server: Server) -> None:
    """Let the page's own code ask for a file, and for a photograph to prepare."""
    script = """async ([path, body]) => {
        const { call } = await import(new URL("api.js", document.baseURI).href);
        return call(path, JSON.parse(body)); }"""
    photograph = (DATA / "handwritten" / "3a.jpg").read_bytes()
    images = [
        pb.Image(encoded=(DATA / "seven.png").read_bytes()),
        pb.Image(encoded=photograph, preprocess=pb.PREPROCESS_AUTO),
    ]
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        for image in images:
            requests = Requests.of(MNIST, image)
            expected = answers_of(channel, requests)
            for request, answer in zip(requests, expected, strict=True):
                path = f"v1/{request.DESCRIPTOR.name.removesuffix('Request').lower()}"
                found = page.evaluate(script, [path, json_format.MessageToJson(request)])
                assert_same(found, answer)
