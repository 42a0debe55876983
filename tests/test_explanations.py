"""Tests of the findings in answers, and of Explain, on a server."""

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PillowImage

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.runtime import Arrays, Runtime
from serving.services.explanations_codec import ExplanationWriter, entropies
from tests.calibrated import CALIBRATION, MNIST, PAIRS, calibrated_models, overlapped
from tests.conftest import DATA, Digits, Running

PATIENCE = 30.0
ROUTING, CONTRIBUTIONS, RELEVANCE = (
    pb.EXPLANATION_PART_ROUTING,
    pb.EXPLANATION_PART_CONTRIBUTIONS,
    pb.EXPLANATION_PART_RELEVANCE,
)


@pytest.fixture
def running(calibrated_servers: Callable[[str], Running], transport: str) -> Running:
    """Every test here runs on each transport."""
    return calibrated_servers(transport)


@pytest.fixture
def start(start_on_each: Callable[..., Running]) -> Callable[..., Running]:
    """Every test here runs on each transport."""
    return start_on_each


def image(pixels: NDArray[np.uint8]) -> pb.Image:
    return pb.Image(pixels=pixels.tobytes())


def classify(running: Running, *images: pb.Image, model: str = MNIST, error: bool = False) -> list[pb.Classification]:
    request = pb.ClassifyRequest(model_name=model, images=images, reconstruction_error=error)
    return list(running.stub.Classify(request, timeout=PATIENCE).results)


def explain(running: Running, *images: pb.Image, model: str = MNIST, **fields: object) -> pb.ExplainResponse:
    request = pb.ExplainRequest(model_name=model, images=images, **fields)  # type: ignore[arg-type]
    response: pb.ExplainResponse = running.stub.Explain(request, timeout=PATIENCE)
    return response


def refusal(running: Running, *images: pb.Image, **fields: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        explain(running, *images, **fields)  # type: ignore[arg-type]
    return caught.value.code(), caught.value.details() or ""


def graph(running: Running, name: str, model: str = MNIST) -> Callable[[Arrays], Arrays]:
    """Return the call of one of the model's files by ONNX Runtime alone."""
    artifact = running.server.repository.get(model, "").artifact
    if name == "classify":
        return Runtime(artifact.file(), "cpu").run
    further = artifact.graphs[name]
    return Runtime(artifact.folder / further.file, "cpu", weights=artifact.weights(further)).run


def test_an_answer_has_confidences_present_classes_and_a_verdict(running: Running, digits: Digits) -> None:
    chosen = digits.images[:50]
    outputs = graph(running, "classify")({"images": chosen[:, None]})
    lengths = np.asarray(outputs["probabilities"], np.float64)
    exponentials = np.exp(lengths / CALIBRATION.temperature)
    confidences = exponentials / exponentials.sum(1, keepdims=True)
    for index, result in enumerate(classify(running, *map(image, chosen))):
        np.testing.assert_allclose([one.confidence for one in result.capsules], confidences[index], atol=1e-6)
        assert result.confidence == result.capsules[result.class_index].confidence
        present = [label for label, length in zip("0123456789", lengths[index], strict=True) if length >= 0.5]
        assert sorted(result.present) == present
        if present == [result.label] and np.diff(np.sort(lengths[index]))[-1] > 0.11:
            assert result.verdict == pb.VERDICT_OK
        assert not result.HasField("reconstruction_error")


def test_two_digits_over_each_other_are_several_and_a_blank_image_is_blank(running: Running, digits: Digits) -> None:
    three, five = (digits.images[np.flatnonzero(digits.labels == label)[0]] for label in (3, 5))
    both, blank = classify(running, image(overlapped(three, five)), image(np.zeros((36, 36), np.uint8)), model=PAIRS)
    assert (both.verdict, sorted(both.present)) == (pb.VERDICT_SEVERAL, ["3", "5"])
    assert both.present[0] == both.label
    assert blank.verdict == pb.VERDICT_BLANK


def test_a_model_without_a_calibration_leaves_the_findings_empty(
    start: Callable[..., Running], digits: Digits, tmp_path: Path
) -> None:
    running = start(models=str(calibrated_models(tmp_path, calibration=None)), model=MNIST)
    (result,) = running.classify(image(digits.images[0])).results
    (explained,) = explain(running, image(digits.images[0]), parts=[ROUTING]).results
    assert explained.classification.verdict == pb.VERDICT_UNSPECIFIED
    (compared,) = classify(running, image(digits.images[0]), error=True)
    assert 0 < compared.reconstruction_error < 0.1 and compared.verdict == pb.VERDICT_UNSPECIFIED
    assert (result.confidence, list(result.present), result.verdict) == (0, [], pb.VERDICT_UNSPECIFIED)
    assert {capsule.confidence for capsule in result.capsules} == {0}


def test_get_model_tells_calibration_preparation_and_primary_capsules(running: Running) -> None:
    model = running.stub.GetModel(pb.GetModelRequest(model_name=MNIST), timeout=PATIENCE)
    artifact = running.server.repository.get(MNIST, "").artifact
    assert list(model.calibration.presence) == [0.5] * 10
    numbers = model.calibration.temperature, model.calibration.margin, model.calibration.reconstruction_error
    np.testing.assert_allclose(numbers, (0.1, 0.1, 0.06), rtol=1e-6)
    assert (model.calibration.objects, model.calibration.arctanh) == (1, False)
    assert model.HasField("preparation") and model.reconstructs
    field = artifact.graphs["explain"].receptive_field
    assert field and model.primary_capsules == pb.PrimaryCapsules(
        types=field.types,
        rows=field.grid,
        columns=field.grid,
        offset=field.offset,
        stride=field.stride,
        size=field.size,
    )


def test_an_explanation_has_the_numbers_of_the_graph(running: Running, digits: Digits) -> None:
    chosen = digits.images[:3]
    outputs = graph(running, "explain")({"images": chosen[:, None]})
    response = explain(running, *map(image, chosen), classes=[0, 7], parts=[ROUTING, CONTRIBUTIONS])
    assert (response.model_name, response.model_version) == (MNIST, "1")
    assert response.primary_capsules.types == 4
    for index, result in enumerate(response.results):
        assert result.pixels == chosen[index].tobytes()
        np.testing.assert_allclose(result.primary_lengths, outputs["primary_lengths"][index], atol=1e-6)
        couplings = np.asarray(outputs["couplings"][index], np.float64)
        entropy = -(couplings * np.log(couplings)).sum(1).mean(1) / np.log(10)
        np.testing.assert_allclose(result.entropies, entropy, atol=1e-6)
        assert [(one.label, one.class_index) for one in result.classes] == [("0", 0), ("7", 7)]
        for one in result.classes:
            assert len(one.iterations) == len(couplings)
            for number, iteration in enumerate(one.iterations):
                np.testing.assert_allclose(iteration.couplings, couplings[number, one.class_index], atol=1e-6)
                agreements = outputs["agreements"][index, number, one.class_index]
                np.testing.assert_allclose(iteration.agreements, agreements, atol=1e-6)
            contributions = outputs["contributions"][index, one.class_index]
            np.testing.assert_allclose(one.contributions, contributions, atol=1e-6)
            assert not one.HasField("relevance")


def test_an_explanation_classifies_as_classify_does_and_explains_the_winner(running: Running, digits: Digits) -> None:
    chosen = [image(one) for one in digits.images[:4]]
    for right, result in zip(
        classify(running, *chosen), explain(running, *chosen, parts=[ROUTING]).results, strict=True
    ):
        given = result.classification
        assert (given.label, list(given.present), given.verdict) == (right.label, list(right.present), right.verdict)
        assert [one.label for one in result.classes] == [right.label]
        assert not result.classes[0].contributions
        for capsule, expected in zip(given.capsules, right.capsules, strict=True):
            assert capsule.confidence == pytest.approx(expected.confidence, abs=1e-6)
            np.testing.assert_allclose(capsule.pose, expected.pose, atol=1e-6)


def test_the_relevance_is_the_mean_drop_of_masked_images(running: Running, digits: Digits) -> None:
    digit = digits.images[0]
    run = graph(running, "classify")
    whole = run({"images": digit[None, None]})["poses"][0]
    (result,) = explain(running, image(digit), classes=[7, 2], parts=[RELEVANCE]).results
    assert not result.entropies and not result.classes[0].iterations
    maps = [np.array(one.relevance.values, np.float32).reshape(28, 28) for one in result.classes]
    assert [(one.relevance.height, one.relevance.width) for one in result.classes] == [(28, 28)] * 2
    total, cover = np.zeros((2, 28, 28)), np.zeros((28, 28))
    for top in range(-1, 27, 2):
        for left in range(-1, 27, 2):
            patch = slice(max(0, top), top + 4), slice(max(0, left), left + 4)
            masked = digit.copy()
            masked[patch] = 0
            poses = run({"images": masked[None, None]})["poses"][0]
            cover[patch] += 1
            for place, index in enumerate((7, 2)):
                direction = whole[index] / np.linalg.norm(whole[index])
                total[place][patch] += whole[index] @ direction - poses[index] @ direction
    np.testing.assert_allclose(maps, total / cover, atol=2e-6)
    assert maps[0].max() > 0.05
    assert maps[0][digit > 0].mean() > maps[0][digit == 0].mean()


def test_masked_images_are_no_answers_in_the_quality_figures(running: Running, digits: Digits) -> None:
    metrics = running.server.repository.get(MNIST, "").classify.metrics
    before = int(metrics.quality.up_to_date.winners.sum())
    explain(running, image(digits.images[1]), parts=[RELEVANCE])
    assert int(metrics.quality.up_to_date.winners.sum()) == before
    classify(running, image(digits.images[1]))
    assert int(metrics.quality.up_to_date.winners.sum()) == before + 1


def test_the_event_loop_writes_no_explanation(
    running: Running, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    write = ExplanationWriter.explanation

    def noted(*arguments: object) -> bytes:
        threads.append(threading.current_thread().name)
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ExplanationWriter, "explanation", noted)
    explain(running, *map(image, digits.images[:3]), parts=[ROUTING, CONTRIBUTIONS])
    assert len(threads) == 3 and all(name.startswith("decode") for name in threads)


def test_a_png_file_is_explained_as_its_pixels_are(running: Running, digits: Digits) -> None:
    file = pb.Image(encoded=(DATA / "seven.png").read_bytes())
    one, other = explain(running, file, image(digits.images[0])).results
    assert one.classification == other.classification
    np.testing.assert_allclose(one.classes[0].relevance.values, other.classes[0].relevance.values, atol=1e-6)


def test_a_picture_of_any_size_is_prepared_and_explained_as_classify_answers_it(
    running: Running, digits: Digits
) -> None:
    dark = PillowImage.fromarray(255 - digits.images[0]).resize((140, 140))
    picture = PillowImage.new("L", (300, 200), 255)
    picture.paste(dark, (90, 30))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    prepared = pb.Image(encoded=buffer.getvalue(), preprocess=pb.PREPROCESS_AUTO)
    (right,) = classify(running, prepared)
    (explained,) = explain(running, prepared, parts=[ROUTING]).results
    assert (right.label, right.verdict) == ("7", pb.VERDICT_OK)
    assert (explained.classification.label, explained.classification.verdict) == (right.label, right.verdict)


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "an unknown class": ({"classes": [3, 10]}, "classes[1]: 10; expected 0 to 9"),
    "a class twice": ({"classes": [3, 4, 3]}, "classes[2]: 3 a second time; expected each class once"),
    "an unknown part": ({"parts": [1, 9]}, "parts[1]: 9; expected 1 to 3"),
    "a part several times": ({"parts": [1, 2, 3, 1]}, "parts: 4; expected 3 at most"),
    "no part": ({"parts": [0]}, "parts[0]: 0; expected 1 to 3"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_request_is_refused_by_name(
    running: Running, digits: Digits, fields: dict[str, object], message: str
) -> None:
    assert refusal(running, image(digits.images[0]), **fields) == (grpc.StatusCode.INVALID_ARGUMENT, message)


def test_wrong_images_are_refused_by_name(running: Running, digits: Digits) -> None:
    digit = image(digits.images[0])
    code, text = refusal(running, digit, pb.Image(pixels=b"1"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text == "images[1].pixels: 1 bytes; expected 784 (1 x 28 x 28, one byte a pixel)"
    assert refusal(running)[1] == "images: 0; expected 1 to 8 (max_explained_images)"
    assert refusal(running, *[digit] * 9)[1] == "images: 9; expected 1 to 8 (max_explained_images)"
    code, text = refusal(running, digit, model="other")
    assert code is grpc.StatusCode.NOT_FOUND
    raw = running.channel.unary_unary("/capsnet.v1.CapsNetService/Explain", bytes, bytes)
    with pytest.raises(grpc.RpcError) as caught:
        raw(b"\x1a\0" * 1_000_000, timeout=PATIENCE)
    assert caught.value.details() == "request: more fields than any request that could be answered"


def test_what_the_limits_never_let_through_says_so(
    start: Callable[..., Running], digits: Digits, tmp_path: Path
) -> None:
    models = str(calibrated_models(tmp_path))
    running = start(models=models, max_queue=100, max_images_per_request=1, max_explained_images=5)
    digit = image(digits.images[0])
    code, text = refusal(running, digit)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text == "parts: the relevance takes 197 images at once; the queue holds only 100 (max_queue)"
    assert refusal(running, digit, digit, parts=[ROUTING])[1] == "images: 2; expected 1 to 1 (max_images_per_request)"
    assert explain(running, digit, parts=[ROUTING]).results[0].classification.label == "7"


def test_a_model_without_the_graphs_says_that_it_cannot(
    start: Callable[..., Running], digits: Digits, tmp_path: Path
) -> None:
    running = start(models=str(calibrated_models(tmp_path, graphs={})), model=MNIST)
    digit = image(digits.images[0])
    code, text = refusal(running, digit, model="")
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert text == "capsnet-mnist version 1 has no graph that explains its answers"
    for call in (
        lambda: running.stub.Reconstruct(pb.ReconstructRequest(image=digit), timeout=PATIENCE),
        lambda: classify(running, digit, model="", error=True),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert caught.value.details() == "capsnet-mnist version 1 has no decoder, which draws poses"
    model = running.stub.GetModel(pb.GetModelRequest(), timeout=PATIENCE)
    assert not model.HasField("primary_capsules") and not model.reconstructs


class Slow:
    """A classifying graph that waits before each batch until ``go`` is set."""

    def __init__(self, running: Running) -> None:
        self.batcher = running.server.repository.get("", "").classify.batcher
        self.go, self.begun = threading.Event(), threading.Event()
        self._run, self.batcher._run = self.batcher._run, self._wait

    def _wait(self, arrays: Arrays) -> Arrays:
        self.begun.set()
        assert self.go.wait(PATIENCE)
        return self._run(arrays)


def test_a_cancelled_explanation_leaves_the_queue(start: Callable[..., Running], digits: Digits) -> None:
    running = start(runtimes=1, max_batch=8)
    slow = Slow(running)
    try:
        call = running.stub.Explain.future(pb.ExplainRequest(images=[image(digits.images[0])]))
        assert slow.begun.wait(PATIENCE)
        assert slow.batcher.queued > 50
        call.cancel()
        end = time.monotonic() + PATIENCE
        while slow.batcher.queued and time.monotonic() < end:
            time.sleep(0.01)
        assert not slow.batcher.queued
    finally:
        slow.go.set()
    assert running.classify(image(digits.images[0])).results[0].label == "7"


def test_an_explanation_ends_at_its_deadline(start: Callable[..., Running], digits: Digits) -> None:
    running = start(runtimes=1, max_batch=8)
    slow = Slow(running)
    try:
        with pytest.raises(grpc.RpcError) as caught:
            running.stub.Explain(pb.ExplainRequest(images=[image(digits.images[0])]), timeout=0.5)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    finally:
        slow.go.set()


def test_an_explanation_waits_in_its_clients_turn(start: Callable[..., Running], digits: Digits) -> None:
    running = start(runtimes=1, max_batch=8)
    slow = Slow(running)
    options = [("grpc.use_local_subchannel_pool", 1)]
    try:
        call = running.stub.Explain.future(pb.ExplainRequest(images=[image(digits.images[0])]))
        assert slow.begun.wait(PATIENCE)
        with grpc.insecure_channel(running.address, options) as channel:
            other = channel.unary_unary(
                "/capsnet.v1.CapsNetService/Classify", pb.ClassifyRequest.SerializeToString, bytes
            ).future(pb.ClassifyRequest(images=[image(digits.images[1])]), timeout=PATIENCE)
            end = time.monotonic() + PATIENCE
            while slow.batcher.pending < 2 and time.monotonic() < end:
                time.sleep(0.01)
            before = slow.batcher.queued
            order = []
            other.add_done_callback(lambda _: order.append("other"))
            call.add_done_callback(lambda _: order.append("explanation"))
            slow.go.set()
            other.result()
            call.result()
        assert order == ["other", "explanation"] and before > 50
    finally:
        slow.go.set()


def test_an_explanation_in_progress_is_answered_at_a_stop(start: Callable[..., Running], digits: Digits) -> None:
    running = start(runtimes=1, max_batch=8)
    slow = Slow(running)
    call = running.stub.Explain.future(pb.ExplainRequest(images=[image(digits.images[0])]))
    assert slow.begun.wait(PATIENCE)
    running.stop()
    slow.go.set()
    assert call.result(PATIENCE).results[0].classification.label == "7"


def test_entropies_are_those_of_shares_and_zero_for_one_class() -> None:
    equal = np.full((2, 4, 3), 0.25)
    np.testing.assert_allclose(entropies(equal), 1)
    np.testing.assert_allclose(entropies(4 * equal), 1, err_msg="couplings that do not add up to 1")
    certain = np.zeros((1, 4, 3))
    certain[:, 2] = 1
    np.testing.assert_array_equal(entropies(certain), 0)
    np.testing.assert_array_equal(entropies(np.ones((3, 1, 5))), 0)
    np.testing.assert_array_equal(entropies(np.zeros((1, 4, 3))), 0)


def test_every_precision_has_findings_by_the_same_calibration(
    start: Callable[..., Running], digits: Digits, tmp_path: Path
) -> None:
    running = start(models=str(calibrated_models(tmp_path)), model=MNIST, precision="int8")
    (result,) = classify(running, image(digits.images[0]))
    assert (result.verdict, list(result.present)) == (pb.VERDICT_OK, ["7"])
    assert result.confidence > 0.99
    (explained,) = explain(running, image(digits.images[0]), parts=[RELEVANCE]).results
    assert max(explained.classes[0].relevance.values) > 0.05
