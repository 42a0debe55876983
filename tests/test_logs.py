"""Tests of the log: its formats, and one line for each refusal."""

import io
import json
import logging
from collections.abc import Callable

import grpc
import pytest

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.logs import FIELDS, FloodFilter, JsonFormatter, RefusalLog, TextFormatter, counted, shows_colours
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
        {
            "method": "capsnet.v1.CapsNetService/Classify",
            "code": "INVALID_ARGUMENT",
            "request_id": "mine-1",
            "peer": "127.0.0.1",
        },
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
        log.write(logging.INFO, str(number), [{"request_id": "id"}], 1)
    log._second -= 1  # a second later
    log.write(logging.INFO, "next", [{"request_id": "id"}], 1)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["0", "1", "2", "7 more requests were refused or failed in a second", "next"]


def test_of_requests_that_are_refused_together_each_has_its_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log = RefusalLog(limit=3)
    refused = ({"request_id": str(number)} for number in range(10))
    log.write(logging.INFO, "full", refused, 10)
    assert [getattr(record, FIELDS)["request_id"] for record in caplog.records] == ["0", "1", "2"]
    assert next(refused) == {"request_id": "3"}, "those without a line are not made"
    log._second -= 1  # a second later
    log.write(logging.INFO, "next", [{"request_id": "10"}], 1)
    assert caplog.records[3].getMessage() == "7 more requests were refused or failed in a second"


def test_text_from_a_client_cannot_look_like_another_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fields = {"method": "s\r/\u2028m", "request_id": "i\nd", "peer": "::1%\x1b]0;x\a"}
    RefusalLog().write(logging.INFO, "a\n2026 ERROR b\x1b[31m", [fields], 1)
    logging.getLogger("other").warning("text of %s", "a\nclient")
    for record in caplog.records:
        for formatter in (TextFormatter(), JsonFormatter()):
            assert formatter.format(record).isprintable()


def test_a_value_from_a_client_cannot_look_like_another_field(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fields = {"request_id": 'x peer=10.0.0.1 "', "peer": "10.6.6.6", "client": ""}
    RefusalLog().write(logging.INFO, "wrong", [fields], 1)
    (record,) = caplog.records
    assert TextFormatter().format(record).endswith(r'wrong request_id="x peer=10.0.0.1 \"" peer=10.6.6.6 client=""')


def test_on_a_terminal_the_level_is_coloured_and_a_client_cannot_send_colours(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("other").warning("a WARNING of %s", "\x1b[31ma client")
    (record,) = caplog.records
    line = TextFormatter(colour=True).format(record)
    assert line.endswith(" \x1b[33mWARNING\x1b[0m a WARNING of \\x1b[31ma client")
    assert line.count("\x1b") == 2


class Screen(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shows_colours(Screen())
    assert not shows_colours(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not shows_colours(Screen())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not shows_colours(Screen())


def test_a_number_and_its_noun_agree() -> None:
    assert [counted(number, "batch", "batches") for number in (0, 1, 2)] == ["0 batches", "1 batch", "2 batches"]
    assert counted(1200, "image") == "1,200 images"


def record_of(error: BaseException | None = None, line: int = 1, created: float = 0.0) -> logging.LogRecord:
    """Return a record of an error in a file "file"."""
    information = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("serving.x", logging.ERROR, "file", line, "failed", (), information)
    record.created = created
    return record


def test_a_line_of_a_traceback_cannot_look_like_a_line_of_the_log() -> None:
    try:
        raise ValueError("text of\n2026-01-01 00:00:00,000 ERROR a client\x1b[2J")
    except ValueError as error:
        first, *others = TextFormatter().format(record_of(error)).splitlines()
    assert first.endswith("ERROR failed")
    assert "    2026-01-01 00:00:00,000 ERROR a client\\x1b[2J" in others
    assert all(line.startswith("    ") and line.isprintable() for line in others)


def test_a_flood_of_lines_from_one_place_of_the_code_is_cut_and_counted() -> None:
    flood = FloodFilter(limit=3)
    assert [flood.filter(record_of(created=5.5)) for _ in range(10)] == [True] * 3 + [False] * 7
    assert flood.filter(record_of(line=2, created=5.6)), "other places are not concerned"
    later = record_of(created=6.1)
    assert flood.filter(later)
    assert getattr(later, FIELDS) == {"left_out": 7}
    calm = record_of(created=7.1)
    assert flood.filter(calm) and not hasattr(calm, FIELDS)


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
