"""Tests of the log: its formats, and one line for each refusal."""

import json
import logging
from collections.abc import Callable

import grpc
import pytest

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.logs import FIELDS, JsonFormatter, RefusalLog, TextFormatter
from serving.repository.served_model import ServedModel
from serving.runtime import Arrays
from tests.conftest import DATA, Running

DIGIT = pb.Image(encoded=(DATA / "seven.png").read_bytes())


def _refusals(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str, dict[str, str]]]:
    return [
        (record.levelno, record.getMessage(), getattr(record, FIELDS))
        for record in caplog.records
        if hasattr(record, FIELDS)
    ]


def test_a_refusal_is_one_line_with_the_clients_request_id_and_a_success_none(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    running.classify(DIGIT)
    with pytest.raises(grpc.RpcError):
        running.stub.Classify(pb.ClassifyRequest(), metadata=(("x-request-id", "mine-1"),), timeout=20)
    (refusal,) = _refusals(caplog)
    assert refusal == (
        logging.INFO,
        "images: 0; expected 1 to 1024 (max_images_per_request)",
        {"method": "capsnet.v1.CapsNetService/Classify", "code": "INVALID_ARGUMENT", "request_id": "mine-1"},
    )
    assert len(caplog.records) == 1


def test_a_refusal_in_a_stream_has_a_line_and_a_missing_request_id_is_made_up(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert len(list(running.stub.ClassifyStream(iter([pb.ClassifyStreamRequest()] * 2), timeout=20))) == 2
    first, second = _refusals(caplog)
    assert first[2]["method"] == "capsnet.v1.CapsNetService/ClassifyStream"
    assert len(first[2]["request_id"]) == len(second[2]["request_id"]) == 16


def test_a_fault_is_an_error_with_its_traceback_and_the_request_id(
    start: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    def patch(model: ServedModel) -> None:
        def fail(arrays: Arrays) -> Arrays:
            raise RuntimeError("inner text")

        model.classify.batcher._run = fail

    faulty = start(patch)
    with pytest.raises(grpc.RpcError):
        faulty.classify(DIGIT)
    (refusal,) = _refusals(caplog)
    assert refusal[0] == logging.ERROR
    assert refusal[2]["code"] == "INTERNAL"
    assert "inner text" in caplog.text


def test_a_flood_of_refusals_is_cut_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log = RefusalLog(limit=3)
    for number in range(10):
        log.write(logging.INFO, "s/m", "OK", str(number), ["id"], 1)
    log._second -= 1  # a second later
    log.write(logging.INFO, "s/m", "OK", "next", ["id"], 1)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["0", "1", "2", "7 more requests were refused or failed in a second", "next"]


def test_of_requests_that_are_refused_together_each_has_its_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log = RefusalLog(limit=3)
    identifiers = map(str, range(10))
    log.write(logging.INFO, "s/m", "OK", "full", identifiers, 10)
    assert [getattr(record, FIELDS)["request_id"] for record in caplog.records] == ["0", "1", "2"]
    assert next(identifiers) == "3", "those without a line are not made"
    log._second -= 1  # a second later
    log.write(logging.INFO, "s/m", "OK", "next", ["10"], 1)
    assert caplog.records[3].getMessage() == "7 more requests were refused or failed in a second"


def test_text_from_a_client_cannot_look_like_another_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    RefusalLog().write(logging.INFO, "s/m", "OK", "a\n2026 ERROR b\x1b[31m", ["i\nd"], 1)
    (record,) = caplog.records
    for formatter in (TextFormatter(), JsonFormatter()):
        assert formatter.format(record).isprintable()


def test_json_has_time_level_message_fields_and_traceback() -> None:
    try:
        raise ValueError("wrong")
    except ValueError as error:
        information = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("serving.x", logging.ERROR, "file", 1, "a %s", ("text",), information)
    setattr(record, FIELDS, {"request_id": "7"})
    entry = json.loads(JsonFormatter().format(record))
    assert entry["time"].endswith("+00:00")
    assert (entry["level"], entry["message"], entry["request_id"]) == ("ERROR", "a text", "7")
    assert "ValueError: wrong" in entry["exception"]
    assert TextFormatter().format(record).splitlines()[0].endswith("ERROR a text request_id=7")
