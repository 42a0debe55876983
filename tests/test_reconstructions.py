"""Tests of Reconstruct, and of the reconstruction error in answers, on a server."""

import io
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.services import reconstructions
from serving.services.drawing import compare
from serving.services.protobuf_wire import delimited
from serving.services.reconstructions import layers_of
from serving.settings import Settings
from tests.calibrated import CALIBRATION, MNIST, PAIRS, calibrated_models, on_canvas, overlapped
from tests.conftest import Digits, Running
from tests.test_explanations import PATIENCE, classify, graph, image

CALL = "/capsnet.v1.CapsNetService/Reconstruct"


@pytest.fixture
def running(calibrated_servers: Callable[[str], Running], transport: str) -> Running:
    """Every test here runs on each transport."""
    return calibrated_servers(transport)


@pytest.fixture
def start(start_on_each: Callable[..., Running]) -> Callable[..., Running]:
    """Every test here runs on each transport."""
    return start_on_each


def reconstruct(running: Running, model: str = MNIST, **fields: object) -> pb.ReconstructResponse:
    request = pb.ReconstructRequest(model_name=model, **fields)  # type: ignore[arg-type]
    response: pb.ReconstructResponse = running.stub.Reconstruct(request, timeout=PATIENCE)
    return response


def poses(*given: tuple[int, list[float]]) -> pb.Poses:
    return pb.Poses(poses=[pb.ClassPose(class_index=index, pose=pose) for index, pose in given])


def drawn(running: Running, given: NDArray[np.float32], classes: list[int], model: str = MNIST) -> NDArray[np.float32]:
    """Return the images (N, C, H, W) of the decoder's file."""
    outputs = graph(running, "decoder", model)({"pose": given, "class": np.array(classes, np.int64)})
    return np.asarray(outputs["image"], np.float32)


def pixels(data: bytes, side: int = 28) -> NDArray[np.int64]:
    return np.frombuffer(data, np.uint8).reshape(side, side).astype(np.int64)


def found(running: Running, images: NDArray[np.uint8], model: str = MNIST) -> NDArray[np.float32]:
    """Return the poses (B, J, E) of images (B, H, W) by the file of the network."""
    return np.asarray(graph(running, "classify", model)({"images": images[:, None]})["poses"], np.float32)


def pair(digits: Digits) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return a 3 and a 5."""
    three, five = (digits.images[np.flatnonzero(digits.labels == label)[place]] for label, place in ((3, 1), (5, 2)))
    return three, five


def test_given_poses_are_drawn_in_their_order(running: Running, digits: Digits) -> None:
    given = found(running, digits.images[:2])
    chosen = [(7, given[0, 7].tolist()), (2, given[1, 2].tolist()), (7, given[1, 7].tolist())]
    response = reconstruct(running, poses=poses(*chosen))
    assert (response.model_name, response.model_version) == (MNIST, "1")
    assert (response.image_channels, response.image_height, response.image_width) == (1, 28, 28)
    assert not response.HasField("classification")
    expected = drawn(running, np.stack([given[0, 7], given[1, 2], given[1, 7]]), [7, 2, 7])
    for result, (index, pose), right in zip(response.results, chosen, expected, strict=True):
        assert (result.label, result.class_index, result.delta, result.layer) == (str(index), index, 0, b"")
        assert list(result.pose) == pose
        assert abs(pixels(result.image) - 255 * right[0]).max() <= 0.5 + 255 * 1e-6


def test_the_event_loop_writes_no_crowd_of_results(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set[str]()
    to_pixels = reconstructions._to_pixels

    def noted(drawn: NDArray[np.float32]) -> NDArray[np.uint8]:
        threads.add(threading.current_thread().name.partition("_")[0])
        return to_pixels(drawn)

    monkeypatch.setattr(reconstructions, "_to_pixels", noted)
    given = poses(*[(index, [0.1] * 16) for index in range(10)])
    sweep = pb.Sweep(dimension=1, first=-1, last=1, steps=64)
    assert len(reconstruct(running, poses=given, sweep=sweep).results) == 640
    assert threads == {"decode"}


def test_an_image_is_drawn_from_its_own_pose_and_compared(running: Running, digits: Digits) -> None:
    digit = digits.images[0]
    response = reconstruct(running, image=image(digit))
    given = found(running, digit[None])
    (result,) = response.results
    assert result.label == "7" and not result.layer
    np.testing.assert_allclose(result.pose, given[0, 7], atol=1e-6)
    right = drawn(running, given[:, 7], [7])
    assert abs(pixels(result.image) - 255 * right[0, 0]).max() <= 0.5 + 255 * 1e-6
    error = float(np.square(right[0, 0].astype(np.float64) - digit / 255).mean())
    assert response.classification.reconstruction_error == pytest.approx(error, abs=1e-6)
    (compared,) = classify(running, image(digit), error=True)
    assert compared.reconstruction_error == pytest.approx(error, abs=1e-6)
    assert response.classification.verdict == compared.verdict == pb.VERDICT_OK
    png = reconstruct(running, image=image(digit), format=pb.FORMAT_PNG).results[0].image
    with Image.open(io.BytesIO(png)) as file:
        assert (file.format, file.mode, file.size) == ("PNG", "L", (28, 28))
        np.testing.assert_array_equal(np.asarray(file), pixels(result.image))


def test_changes_and_a_sweep_move_the_pose(running: Running, digits: Digits) -> None:
    digit = image(digits.images[0])
    plain = np.array(reconstruct(running, image=digit, classes=[7, 9]).results[0].pose, np.float32)
    changes = [pb.Change(dimension=2, delta=0.25), pb.Change(dimension=15, delta=-0.5)]
    changed = reconstruct(running, image=digit, classes=[7, 9], changes=changes).results
    shift = np.zeros(16, np.float32)
    shift[[2, 15]] = 0.25, -0.5
    np.testing.assert_allclose(changed[0].pose, plain + shift, atol=1e-6)
    assert [one.layer for one in changed] == [b"", b""]
    sweep = pb.Sweep(dimension=2, first=-0.25, last=0.25, steps=3)
    swept = reconstruct(running, image=digit, classes=[7, 9], changes=changes, sweep=sweep).results
    assert [(one.class_index, one.delta) for one in swept] == [
        (7, -0.25),
        (7, 0),
        (7, 0.25),
        (9, -0.25),
        (9, 0),
        (9, 0.25),
    ]
    for step, one in enumerate(swept[:3]):
        expected = plain + shift
        expected[2] += (-0.25, 0, 0.25)[step]
        np.testing.assert_allclose(one.pose, expected, atol=1e-6)
        assert abs(pixels(one.image) - 255 * drawn(running, expected[None], [7])[0, 0]).max() <= 0.51
        assert not one.layer
    assert swept[1].image == changed[0].image != swept[0].image


def test_two_digits_over_each_other_are_both_drawn_and_separated(running: Running, digits: Digits) -> None:
    three, five = pair(digits)
    both = overlapped(three, five)
    response = reconstruct(running, PAIRS, image=image(both))
    assert response.classification.verdict == pb.VERDICT_SEVERAL
    assert [one.label for one in response.results] == list(response.classification.present)
    parts = dict(zip("35", on_canvas(three, five), strict=True))
    for result in response.results:
        layer, own = pixels(result.layer, 36), parts[result.label]
        assert ((layer == 0) | (layer == both)).all()
        ink, right = layer > 127, own > 127
        assert (ink & right).sum() / (ink | right).sum() > 0.8
    order = [one.class_index for one in response.results]
    rebuilt = drawn(running, found(running, both[None], PAIRS)[0, order], order, PAIRS)
    expected = layers_of(both[None], rebuilt, np.zeros(1, np.uint8))
    # A pixel whose two reconstructions are nearly at the threshold may fall on either side.
    assert sum((pixels(one.layer, 36) != expected[place, 0]).sum() for place, one in enumerate(response.results)) <= 4
    error = float(np.square(np.minimum(rebuilt.sum(0), 1) - both / 255).mean())
    assert response.classification.reconstruction_error == pytest.approx(error, abs=1e-6)
    png = reconstruct(running, PAIRS, image=image(both), format=pb.FORMAT_PNG)
    with Image.open(io.BytesIO(png.results[1].layer)) as file:
        np.testing.assert_array_equal(np.asarray(file), pixels(response.results[1].layer, 36))
    one = reconstruct(running, PAIRS, image=image(both), classes=[5])
    assert [result.layer for result in one.results] == [b""]
    assert one.classification == response.classification


def test_an_image_that_is_reconstructed_badly_is_suspicious(
    start: Callable[..., Running], digits: Digits, tmp_path: Path
) -> None:
    strict = replace(CALIBRATION, margin=0.0, reconstruction_error=0.01)
    running = start(models=str(calibrated_models(tmp_path, calibration=strict)), model=MNIST)
    chosen = [image(one) for one in digits.images[:40]]
    plain, compared = classify(running, *chosen), classify(running, *chosen, error=True)
    for one, other in zip(plain, compared, strict=True):
        bad = one.verdict == pb.VERDICT_OK and other.reconstruction_error > np.float32(0.01)
        assert other.verdict == (pb.VERDICT_SUSPICIOUS if bad else one.verdict)
    assert {pb.VERDICT_OK, pb.VERDICT_SUSPICIOUS} <= {one.verdict for one in compared}


def test_the_error_of_many_images_is_that_of_each(start: Callable[..., Running], digits: Digits) -> None:
    running = start(max_queue=32, max_images_per_request=32)
    chosen = [image(one) for one in digits.images[:32]]
    together = classify(running, *chosen, model="", error=True)
    alone = [classify(running, one, model="", error=True)[0] for one in chosen[:4]]
    for one, other in zip(together, alone, strict=False):
        assert one.reconstruction_error == pytest.approx(other.reconstruction_error, abs=1e-6)
    assert all(one.HasField("reconstruction_error") for one in together)


def test_a_stream_keeps_its_order_where_some_requests_ask_for_the_error(running: Running, digits: Digits) -> None:
    requests = []
    for index in range(24):
        request = pb.ClassifyRequest(model_name=MNIST, images=[image(digits.images[index])])
        request.reconstruction_error = index % 3 == 0
        if index % 8 == 6:
            request.images[0].pixels = b"1"
        requests.append(pb.ClassifyStreamRequest(id=str(index), request=request))
    answers = list(running.stub.ClassifyStream(iter(requests), timeout=PATIENCE))
    assert [answer.id for answer in answers] == [str(index) for index in range(24)]
    for index, answer in enumerate(answers):
        if index % 8 == 6:
            assert answer.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
            assert answer.error.message.startswith("images[0].pixels: 1 bytes")
            continue
        result = answer.response.results[0]
        assert result.HasField("reconstruction_error") == (index % 3 == 0)
        (right,) = classify(running, image(digits.images[index]), error=index % 3 == 0)
        assert result.label == right.label and result.verdict == right.verdict
        assert result.reconstruction_error == pytest.approx(right.reconstruction_error, abs=1e-6)


WIDE = [0.0] * 16
WRONG: dict[str, tuple[dict[str, object], str]] = {
    "neither": ({}, "source: neither image nor poses; expected one of them"),
    "no poses": ({"poses": poses()}, "poses.poses: none; expected one at least"),
    "a short pose": ({"poses": poses((1, [0.0] * 15))}, "poses.poses[0].pose: 15 numbers; expected 16"),
    "a long pose": ({"poses": poses((1, WIDE), (1, [0.0] * 17))}, "poses.poses[1].pose: 17 numbers; expected 16"),
    "an unknown class": ({"poses": poses((10, WIDE))}, "poses.poses[0].class_index: 10; expected 0 to 9"),
    "no number": (
        {"poses": poses((1, [*WIDE[:15], float("nan")]))},
        "poses.poses[0].pose[15]: nan; expected -1000 to 1000",
    ),
    "infinity": (
        {"poses": poses((1, [float("-inf"), *WIDE[1:]]))},
        "poses.poses[0].pose[0]: -inf; expected -1000 to 1000",
    ),
    "classes of poses": (
        {"poses": poses((1, WIDE)), "classes": [1]},
        "classes: 1 with poses, which have their own; expected none",
    ),
    "a class too many": ({"image": pb.Image(pixels=bytes(784)), "classes": [1, 10]}, "classes[1]: 10; expected 0 to 9"),
    "a class twice": (
        {"image": pb.Image(pixels=bytes(784)), "classes": [1, 1]},
        "classes[1]: 1 a second time; expected each class once",
    ),
    "a dimension too many": (
        {"poses": poses((1, WIDE)), "changes": [pb.Change(), pb.Change(dimension=16)]},
        "changes[1].dimension: 16; expected 0 to 15",
    ),
    "a dimension twice": (
        {"poses": poses((1, WIDE)), "changes": [pb.Change(dimension=3), pb.Change(dimension=3)]},
        "changes[1].dimension: 3 a second time; expected each once",
    ),
    "an endless change": (
        {"poses": poses((1, WIDE)), "changes": [pb.Change(delta=float("inf"))]},
        "changes[0].delta: inf; expected -1000 to 1000",
    ),
    "a sweep's dimension": (
        {"poses": poses((1, WIDE)), "sweep": pb.Sweep(dimension=16, steps=2)},
        "sweep.dimension: 16; expected 0 to 15",
    ),
    "a sweep's end": (
        {"poses": poses((1, WIDE)), "sweep": pb.Sweep(last=float("nan"), steps=2)},
        "sweep.last: nan; expected -1000 to 1000",
    ),
    "a single step": ({"poses": poses((1, WIDE)), "sweep": pb.Sweep(steps=1)}, "sweep.steps: 1; expected 2 to 64"),
    "too many steps": ({"poses": poses((1, WIDE)), "sweep": pb.Sweep(steps=65)}, "sweep.steps: 65; expected 2 to 64"),
    "too many images": (
        {"poses": poses(*[(1, WIDE)] * 17), "sweep": pb.Sweep(steps=64)},
        "sweep.steps: 1088 images (17 poses in 64 steps); expected 1024 at most (max_images_per_request)",
    ),
    "too many poses": (
        {"poses": poses(*[(1, WIDE)] * 1025)},
        "poses.poses: 1025 images (1025 poses in 1 steps); expected 1024 at most (max_images_per_request)",
    ),
    "an unknown format": ({"poses": poses((1, WIDE)), "format": 3}, "format: 3; expected 0 to 2"),
    "too few pixels": (
        {"image": pb.Image(pixels=b"1")},
        "image.pixels: 1 bytes; expected 784 (1 x 28 x 28, one byte a pixel)",
    ),
    "no file": ({"image": pb.Image(encoded=b"text")}, "image.encoded: 4 bytes that are neither a PNG nor a JPEG file"),
    "prepared pixels": (
        {"image": pb.Image(pixels=bytes(784), preprocess=pb.PREPROCESS_AUTO)},
        "image.preprocess: PREPROCESS_AUTO for raw pixels; expected PREPROCESS_NONE, or a PNG or JPEG file in encoded",
    ),
    "nothing in the image": ({"image": pb.Image()}, "image: has no content; expected pixels or encoded"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_request_is_refused_by_name(running: Running, fields: dict[str, object], message: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        reconstruct(running, **fields)  # type: ignore[arg-type]
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, message)


def test_the_largest_numbers_of_a_pose_are_drawn(running: Running) -> None:
    given = poses((1, [1000.0] * 16), (2, [-1000.0] * 16))
    changes = [pb.Change(dimension=0, delta=1000)]
    sweep = pb.Sweep(first=-1000, last=1000, steps=64)
    assert len(reconstruct(running, poses=given, changes=changes, sweep=sweep, format=pb.FORMAT_PNG).results) == 128


def test_as_many_poses_as_are_allowed_are_drawn_if_their_numbers_come_one_by_one(running: Running) -> None:
    """Protobuf's readers accept numbers in fields of their own as well as packed ones."""
    model = pb.ReconstructRequest(model_name=MNIST).SerializeToString()
    pose = b"\x08\x01" + struct.pack("<Bf", 0x15, 0.1) * 16
    data = model + delimited(4, delimited(1, pose) * Settings.max_images_per_request)
    response = pb.ReconstructResponse.FromString(
        running.channel.unary_unary(CALL, bytes, bytes)(data, timeout=PATIENCE)
    )
    assert len(response.results) == Settings.max_images_per_request


def test_a_message_of_millions_of_poses_is_refused_before_it_is_read(running: Running) -> None:
    content = b"\x0a\0" * 1_000_000
    data = pb.ReconstructRequest(poses=pb.Poses()).SerializeToString()[:1]
    size = len(content)
    varint = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
    with pytest.raises(grpc.RpcError) as caught:
        running.channel.unary_unary(CALL, bytes, bytes)(data + varint + content, timeout=PATIENCE)
    assert caught.value.details() == "request: more fields than any request that could be answered"


def test_the_graphs_count_their_own_rows(start: Callable[..., Running], digits: Digits, tmp_path: Path) -> None:
    running = start(models=str(calibrated_models(tmp_path)), model=MNIST)

    def rows(name: str) -> float | None:
        labels = {"model": MNIST, "version": "1", "graph": name}
        return running.server.metrics.registry.get_sample_value("capsnet_batch_size_images_sum", labels)

    reconstruct(running, image=image(digits.images[0]))
    assert (rows("classify"), rows("decoder"), rows("explain")) == (1, 1, 0)
    reconstruct(running, image=image(digits.images[0]), classes=[7, 8])
    assert (rows("classify"), rows("decoder")) == (2, 4), "two are drawn, and the one that is compared"
    classify(running, *map(image, digits.images[:5]), error=True)
    assert (rows("classify"), rows("decoder")) == (7, 9)


def test_errors_are_of_the_sum_of_an_images_reconstructions_up_to_white() -> None:
    images = np.array([255, 51], np.uint8).reshape(2, 1, 1, 1)
    parts = np.array([0.9, 0.9, 0.3], np.float32).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(compare(images, parts, [2, 1]), [0, 0.01], atol=1e-7)


def test_a_layer_has_the_pixels_where_its_reconstruction_is_nearly_the_brightest() -> None:
    image = np.array([[[10, 20, 30]]], np.uint8)
    parts = np.array([[[[1.0, 0.5, 0.0]]], [[[0.6, 1.0, 0.0]]]], np.float32)
    layers = layers_of(image, parts, np.array([7], np.uint8))
    assert layers[:, 0, 0].tolist() == [[10, 7, 30], [10, 20, 30]]
