"""Tests of explanations, reconstructions and findings with both Python clients, without and with asyncio."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.client import (
    AsyncCapsNetClient,
    CapsNetClient,
    CapsNetError,
    InvalidImage,
    InvalidRequest,
    Overloaded,
    PrimaryCapsules,
    ServerFault,
    Sweep,
    Unsupported,
    Verdict,
)
from tests.calibrated import MNIST, PAIRS, overlapped
from tests.conftest import DATA, Digits, Running
from tests.fake_server import FakeServer, answer, numbered

SEVEN = DATA / "seven.png"
PHOTOGRAPH = DATA / "handwritten" / "8b.jpg"

# A function that calls a method of one of the two clients: its name, the arguments, and the settings of the client.
Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def running(calibrated_servers: Callable[[str], Running]) -> Running:
    return calibrated_servers("native")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as result:
        yield result


def _with_threads(address: str, method: str, *arguments: Any, settings: Any = None, **options: Any) -> Any:
    with CapsNetClient(address, **settings or {}) as client:
        result = getattr(client, method)(*arguments, **options)
        return list(result) if method == "classify_stream" else result


def _with_asyncio(address: str, method: str, *arguments: Any, settings: Any = None, **options: Any) -> Any:
    async def main() -> Any:
        async with AsyncCapsNetClient(address, **settings or {}) as client:
            result = getattr(client, method)(*arguments, **options)
            return [one async for one in result] if method == "classify_stream" else await result

    return asyncio.run(main())


@pytest.fixture(params=[_with_threads, _with_asyncio], ids=["threads", "asyncio"])
def ask(request: pytest.FixtureRequest) -> Ask:
    function: Ask = request.param
    return function


def _of(model: str) -> dict[str, str]:
    return {"model": model}


def _explained(request: pb.ExplainRequest) -> pb.ExplainResponse:
    """Return an explanation of a network with two primary capsules and two iterations, on (1, 2, 2)."""
    classified = answer(pb.ClassifyRequest(images=request.images))
    response = pb.ExplainResponse(model_name="fake", model_version="1")
    response.primary_capsules.CopyFrom(pb.PrimaryCapsules(types=1, rows=1, columns=2, offset=-1, stride=2, size=3))
    for image, result in zip(request.images, classified.results, strict=True):
        response.results.add(
            classification=result,
            primary_lengths=[0.25, 0.5],
            entropies=[1, 0.5],
            pixels=image.pixels,
            classes=[
                pb.ClassExplanation(
                    label="ab"[index],
                    class_index=index,
                    iterations=[
                        pb.RoutingIteration(couplings=[0.5, 0.5], agreements=[1, 2]),
                        pb.RoutingIteration(couplings=[0.25, 0.75], agreements=[3, 4]),
                    ],
                    contributions=[0.5, -0.5],
                    relevance=pb.Map(height=2, width=2, values=[0, 1, 2, 3]),
                )
                for index in request.classes or [0]
            ],
        )
    return response


def test_results_have_the_findings_that_the_server_sent(running: Running, ask: Ask, digits: Digits) -> None:
    images = digits.images[:40]
    results = ask(running.address, "classify", images, settings=_of(MNIST))
    request = pb.ClassifyRequest(model_name=MNIST, images=[pb.Image(pixels=one.tobytes()) for one in images])
    for result, sent in zip(results, running.stub.Classify(request, timeout=20).results, strict=True):
        assert result.confidence == sent.confidence == result.confidences[result.class_index]
        assert result.confidences.tolist() == [one.confidence for one in sent.capsules]
        assert result.confidences.sum() == pytest.approx(1, abs=1e-5)
        assert result.present == tuple(sent.present)
        assert f"VERDICT_{result.verdict}" == pb.Verdict.Name(sent.verdict)
        assert result.reconstruction_error is None
        assert not result.confidences.flags.writeable
    assert results[0].verdict is Verdict.OK


@pytest.mark.parametrize("method", ["classify", "classify_stream"])
def test_several_digits_and_a_blank_image_are_told_with_their_errors(
    running: Running, ask: Ask, digits: Digits, method: str
) -> None:
    three, five = (digits.images[np.flatnonzero(digits.labels == label)[0]] for label in (3, 5))
    images = np.stack([overlapped(three, five), np.zeros((36, 36), np.uint8)])
    both, blank = ask(running.address, method, images, reconstruction_error=True, settings=_of(PAIRS))
    assert (both.verdict, set(both.present)) == ("SEVERAL", {"3", "5"})
    assert blank.verdict is Verdict.BLANK
    assert 0 < both.reconstruction_error < 0.2


def test_the_model_tells_calibration_preparation_and_places(running: Running, ask: Ask) -> None:
    model = ask(running.address, "get_model", settings=_of(MNIST))
    assert model.calibration.presence == (0.5,) * 10
    assert model.calibration.temperature == pytest.approx(0.1)
    assert (model.calibration.objects, model.calibration.arctanh) == (1, False)
    assert model.preparation.polarity == "bright-on-dark"
    assert model.primary_capsules.shape == (4, model.primary_capsules.rows, model.primary_capsules.columns)
    assert model.reconstructs


def test_an_explanation_has_the_arrays_of_the_answer(running: Running, ask: Ask, digits: Digits) -> None:
    images = digits.images[:3]
    results = ask(running.address, "explain", images, classes=["7", 0], settings=_of(MNIST))
    request = pb.ExplainRequest(
        model_name=MNIST, images=[pb.Image(pixels=one.tobytes()) for one in images], classes=[7, 0]
    )
    sent = running.stub.Explain(request, timeout=60)
    count = results[0].primary_capsules.count
    assert results[0].primary_capsules == PrimaryCapsules.from_message(sent.primary_capsules)
    for image, result, wanted in zip(images, results, sent.results, strict=True):
        assert result.pixels.tolist() == [image.tolist()]
        assert result.classification.label == wanted.classification.label
        np.testing.assert_allclose(result.primary_lengths, wanted.primary_lengths, atol=1e-6)
        np.testing.assert_allclose(result.entropies, wanted.entropies, atol=1e-6)
        assert [(one.label, one.class_index) for one in result.classes] == [("7", 7), ("0", 0)]
        for one, other in zip(result.classes, wanted.classes, strict=True):
            assert one.couplings.shape == one.agreements.shape == (3, count)
            np.testing.assert_allclose(one.couplings, [each.couplings for each in other.iterations], atol=1e-6)
            np.testing.assert_allclose(one.agreements, [each.agreements for each in other.iterations], atol=1e-5)
            np.testing.assert_allclose(one.contributions, other.contributions, atol=1e-5)
            np.testing.assert_allclose(one.relevance.ravel(), other.relevance.values, atol=1e-5)
            assert one.relevance.shape == (28, 28)
            assert not one.relevance.flags.writeable


def test_only_the_parts_that_are_asked_for_come_and_more_images_than_a_request_holds(
    running: Running, ask: Ask, digits: Digits
) -> None:
    images = digits.images[:12]  # the server explains eight in one request
    results = ask(running.address, "explain", images, parts=["contributions"], settings=_of(MNIST))
    assert "".join(result.classification.label for result in results) == "721041495906"
    for result in results:
        [one] = result.classes
        assert one.label == result.classification.label
        assert one.contributions.size == result.primary_lengths.size > 0
        assert (one.couplings.size, one.agreements.size, one.relevance.size, result.entropies.size) == (0, 0, 0, 0)


def test_a_photograph_is_explained_on_the_pixels_that_the_network_saw(running: Running, ask: Ask) -> None:
    options = {"preprocess": "auto", "parts": ["contributions"], "settings": _of(MNIST)}
    [result] = ask(running.address, "explain", PHOTOGRAPH, **options)
    assert result.classification.label == "8"
    assert result.pixels.shape == (1, 28, 28)
    assert result.pixels[0, 0].max() < 64 < 192 < result.pixels.max()
    [same] = ask(running.address, "explain", result.pixels, parts=["contributions"], settings=_of(MNIST))
    assert same.classes[0].contributions.tolist() == pytest.approx(result.classes[0].contributions.tolist(), abs=1e-5)


def test_an_image_is_drawn_from_its_own_pose(running: Running, ask: Ask, digits: Digits) -> None:
    [drawn] = ask(running.address, "reconstruct", SEVEN, settings=_of(MNIST))
    assert (drawn.label, drawn.class_index, drawn.delta, drawn.layer) == ("7", 7, 0, None)
    assert drawn.image.shape == (1, 28, 28) and drawn.image.dtype == np.uint8
    assert drawn.pose.tolist() == drawn.classification.pose.tolist()
    assert 0 < drawn.classification.reconstruction_error < 0.05
    error = np.square((drawn.image[0] - digits.images[0].astype(float)) / 255).mean()
    assert error == pytest.approx(drawn.classification.reconstruction_error, abs=1e-3)


def test_given_poses_are_drawn_as_those_of_the_image(running: Running, ask: Ask, digits: Digits) -> None:
    [result] = ask(running.address, "classify", digits.images[0], settings=_of(MNIST))
    given = {"7": result.pose, 2: result.poses[2].tolist()}
    seven, two = ask(running.address, "reconstruct", poses=given, settings=_of(MNIST))
    wanted = ask(running.address, "reconstruct", digits.images[0], classes=["7", 2], settings=_of(MNIST))
    assert [seven.label, two.label] == ["7", "2"]
    for one, other in zip([seven, two], wanted, strict=True):
        assert one.classification is None and one.layer is None
        assert np.abs(one.image.astype(int) - other.image).max() <= 1
    pairs = ask(running.address, "reconstruct", poses=[("7", result.pose), ("7", -result.pose)], settings=_of(MNIST))
    assert [one.label for one in pairs] == ["7", "7"]


def test_changes_and_sweeps_move_the_pose(running: Running, ask: Ask) -> None:
    [plain] = ask(running.address, "reconstruct", SEVEN, settings=_of(MNIST))
    [changed] = ask(running.address, "reconstruct", SEVEN, changes={1: 0.25, 3: -0.5}, settings=_of(MNIST))
    moved = np.zeros(16)
    moved[[1, 3]] = 0.25, -0.5
    np.testing.assert_allclose(changed.pose - plain.pose, moved, atol=1e-6)
    assert changed.image.tolist() != plain.image.tolist()
    row = ask(running.address, "reconstruct", SEVEN, sweep=Sweep(1, -0.2, 0.2, 5), settings=_of(MNIST))
    assert [one.delta for one in row] == pytest.approx([-0.2, -0.1, 0, 0.1, 0.2])
    assert np.abs(row[2].image.astype(int) - plain.image).max() <= 1
    assert ask(running.address, "reconstruct", SEVEN, sweep=(1, -0.2, 0.2, 2), settings=_of(MNIST))[1].delta > 0


def test_overlapping_digits_are_drawn_apart(running: Running, ask: Ask, digits: Digits) -> None:
    three, five = (digits.images[np.flatnonzero(digits.labels == label)[0]] for label in (3, 5))
    image = overlapped(three, five)
    drawn = ask(running.address, "reconstruct", image, settings=_of(PAIRS))
    assert {one.label for one in drawn} == {"3", "5"}
    assert np.maximum(*(one.layer[0] for one in drawn)).tolist() == image.tolist()


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("reconstruct", {}, "image and poses: neither; expected one of them"),
        ("reconstruct", {"image": SEVEN, "poses": {7: [0.0]}}, "image and poses: both; expected one of them"),
        ("reconstruct", {"poses": {7: [0.0]}, "classes": [7]}, "classes with poses"),
        ("reconstruct", {"poses": {7: [0.0]}, "preprocess": "auto"}, "resize and preprocess: given with poses"),
        ("reconstruct", {"poses": {}}, "poses: none; expected one at least"),
        ("reconstruct", {"poses": {7: [[0.0]]}}, r"poses: an array of shape \(1, 1\) for class 7; expected \(E,\)"),
        ("reconstruct", {"image": SEVEN, "changes": {-1: 0.5}}, "changes: dimension -1; expected a whole number, 0"),
        ("reconstruct", {"image": SEVEN, "changes": {1: float("nan")}}, "changes: nan; expected a finite number"),
        ("reconstruct", {"image": SEVEN, "sweep": (1, 0, 1, 1)}, "sweep: 1 steps; expected 2 or more"),
        ("reconstruct", {"image": SEVEN, "sweep": (1, 0, 1)}, "sweep: 3 values; expected dimension, first, last"),
        ("explain", {"images": SEVEN, "classes": []}, "classes: none; expected one at least, or None"),
        ("explain", {"images": SEVEN, "classes": [-1]}, "classes: -1; expected labels, or indices from 0"),
        ("explain", {"images": SEVEN, "parts": ["all"]}, "parts: .*expected some of routing, contributions"),
        ("explain", {"images": SEVEN, "parts": "routing"}, "parts: 'routing'; expected a list of parts"),
        ("explain", {"images": SEVEN, "resize": True, "preprocess": "auto"}, "resize and preprocess='auto': both"),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_any_call(
    ask: Ask, method: str, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(InvalidRequest, match=text):
        ask("127.0.0.1:1", method, **options)


@pytest.mark.parametrize(
    ("method", "options", "kind", "field", "text"),
    [
        ("explain", {"images": [SEVEN, b"junk"]}, InvalidImage, "images[1].encoded", "neither a PNG nor a JPEG"),
        ("explain", {"images": [SEVEN, "missing"]}, InvalidImage, "images[1]", "No such file"),
        ("explain", {"images": SEVEN, "classes": ["x"]}, InvalidRequest, "classes[0]", "'x'; capsnet-mnist has 0, 1"),
        ("explain", {"images": SEVEN, "classes": [10]}, InvalidRequest, "classes[0]", "10; expected 0 to 9"),
        ("reconstruct", {"image": b"junk"}, InvalidImage, "image.encoded", "neither a PNG nor a JPEG"),
        ("reconstruct", {"image": "missing"}, InvalidImage, "image", "No such file"),
        ("reconstruct", {"image": np.zeros((2, 28, 28), np.uint8)}, InvalidImage, "image", "2 images; expected one"),
        ("reconstruct", {"image": [SEVEN]}, InvalidImage, "image", "list; expected an array"),
        ("reconstruct", {"image": SEVEN, "changes": {99: 1}}, InvalidRequest, "changes[0].dimension", "0 to 15"),
        ("reconstruct", {"poses": {7: [0.0]}}, InvalidRequest, "poses.poses[0].pose", "1 numbers; expected 16"),
    ],
)
def test_an_error_names_the_field(
    running: Running, ask: Ask, method: str, options: dict[str, Any], kind: type[InvalidRequest], field: str, text: str
) -> None:
    if "images" in options and isinstance(options["images"], list):
        options = options | {"parts": ["contributions"]}
    with pytest.raises(kind, match=text) as raised:
        ask(running.address, method, **options, settings=_of(MNIST))
    assert type(raised.value) is kind
    assert raised.value.field == field
    assert str(raised.value).startswith(f"{field}: ")
    assert raised.value.index == (1 if field.startswith("images[1]") else None)


def test_an_older_server_answers_without_findings_and_refuses_the_new_methods(server: FakeServer, ask: Ask) -> None:
    [result] = ask(server.address, "classify", numbered(1), reconstruction_error=True)
    assert (result.verdict, result.confidence, result.present) == (Verdict.UNKNOWN, 0, ())
    assert result.confidences.tolist() == [0, 0]
    assert result.reconstruction_error is None
    model = ask(server.address, "get_model")
    assert (model.preparation, model.calibration, model.primary_capsules, model.reconstructs) == (
        None,
        None,
        None,
        False,
    )
    for method in ("explain", "reconstruct"):
        with pytest.raises(Unsupported, match="Method not found") as raised:
            ask(server.address, method, numbered(1))
        assert raised.value.code is grpc.StatusCode.UNIMPLEMENTED


def test_a_verdict_that_this_client_does_not_know_is_unknown(server: FakeServer, ask: Ask) -> None:
    def explained(request: pb.ExplainRequest) -> pb.ExplainResponse:
        response = _explained(request)
        response.results[0].classification.verdict = 99  # type: ignore[assignment]
        return response

    server.explain = explained
    [result] = ask(server.address, "explain", numbered(1))
    assert result.classification.verdict is Verdict.UNKNOWN


def test_each_image_is_explained_by_its_own_request_with_the_token(server: FakeServer, ask: Ask) -> None:
    requests: list[pb.ExplainRequest] = []

    def explained(request: pb.ExplainRequest) -> pb.ExplainResponse:
        requests.append(request)
        return _explained(request)

    server.explain = explained
    results = ask(server.address, "explain", [numbered(n) for n in range(3)], classes="b", settings={"token": "secret"})
    assert [int(result.classification.pose[0]) for result in results] == [0, 1, 2]
    assert [(len(request.images), list(request.classes), list(request.parts)) for request in requests] == [
        (1, [1], [])
    ] * 3
    assert server.metadata["authorization"] == "Bearer secret"
    [one] = results[1].classes
    assert one.label == "b"
    assert one.couplings.tolist() == [[0.5, 0.5], [0.25, 0.75]]
    assert one.agreements.tolist() == [[1, 2], [3, 4]]
    assert one.relevance.tolist() == [[0, 1], [2, 3]]
    assert results[1].pixels.tolist() == [numbered(1).tolist()]


def test_busy_servers_are_asked_again_and_deadlines_hold(server: FakeServer, ask: Ask) -> None:
    server.explain = _explained
    server.steps = [(grpc.StatusCode.UNAVAILABLE, ())]
    assert len(ask(server.address, "explain", numbered(1))) == 1
    assert len(server.called_at) == 2
    server.steps = [(grpc.StatusCode.RESOURCE_EXHAUSTED, ())]
    with pytest.raises(Overloaded) as raised:
        ask(server.address, "explain", [numbered(1)], settings={"retries": 0})
    assert raised.value.index == 0
    server.steps = [(grpc.StatusCode.RESOURCE_EXHAUSTED, ())] * 9
    with pytest.raises(CapsNetError):
        ask(server.address, "reconstruct", numbered(1), timeout=0.2)


def _without_pixels(response: pb.ExplainResponse) -> None:
    response.results[0].pixels = b"123"


def _without_a_coupling(response: pb.ExplainResponse) -> None:
    response.results[0].classes[0].iterations[0].couplings.pop()


def _without_results(response: pb.ExplainResponse) -> None:
    del response.results[:]


def _without_a_value(response: pb.ExplainResponse) -> None:
    response.results[0].classes[0].relevance.values.pop()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (_without_pixels, "pixels: 3 bytes; expected 1 x 2 x 2"),
        (_without_a_coupling, "couplings: 3 numbers; expected 2 x 2"),
        (_without_results, "results: 0; expected 1"),
        (_without_a_value, "relevance.values: 3 numbers; expected 2 x 2"),
    ],
)
def test_an_explanation_that_breaks_the_contract_is_a_fault(
    server: FakeServer, ask: Ask, damage: Callable[[pb.ExplainResponse], None], text: str
) -> None:
    def explained(request: pb.ExplainRequest) -> pb.ExplainResponse:
        response = _explained(request)
        damage(response)
        return response

    server.explain = explained
    with pytest.raises(ServerFault, match=text):
        ask(server.address, "explain", numbered(1))


def test_a_reconstruction_that_breaks_the_contract_is_a_fault(server: FakeServer, ask: Ask) -> None:
    for drawn, text in (
        (pb.Reconstruction(pose=[1], image=b"123"), r"results\[0\].image: 3 bytes; expected 1 x 2 x 2"),
        (pb.Reconstruction(pose=[1], image=b"1234", layer=b"1"), r"results\[0\].layer: 1 bytes"),
        (pb.Reconstruction(image=b"1234"), r"results\[0\].pose: empty"),
    ):
        response = pb.ReconstructResponse(results=[drawn], image_channels=1, image_height=2, image_width=2)
        server.reconstruct = lambda _, response=response: response
        with pytest.raises(ServerFault, match=text):
            ask(server.address, "reconstruct", numbered(1))


def test_a_primary_capsule_sees_its_place_in_the_image() -> None:
    capsules = PrimaryCapsules(types=2, rows=3, columns=4, offset=-2, stride=4, size=9)
    assert capsules.count == 24
    first, last = capsules.place(0), capsules.place(23)
    assert first == (slice(0, 7), slice(0, 7))
    assert last == (slice(6, 15), slice(10, 19))
    assert capsules.centre(0) == (2, 2)
    assert capsules.centre(12 + 4 + 1) == (6, 6)
    for unknown in (-1, 24):
        with pytest.raises(IndexError, match=f"capsule {unknown}; expected 0 to 23"):
            capsules.place(unknown)
