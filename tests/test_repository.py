"""Tests of the models of a repository folder: several at once, new versions, bad versions, and removed ones."""

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import grpc
import numpy as np
import onnx
import pytest
from google.rpc.error_details_pb2 import BadRequest
from google.rpc.status_pb2 import Status
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.capsnet.v1.capsnet_pb2_grpc import CapsNetServiceStub
from protos.inference import inference_pb2 as inference
from protos.inference.inference_pb2_grpc import GRPCInferenceServiceStub
from serving import artifact
from serving.artifact import ArtifactError
from serving.repository.repository import Repository
from serving.repository.served_model import ServedModel
from serving.runtime import Arrays
from tests.conftest import DATA, ROOT, Running
from tests.test_lifecycle import failed_start, server_process

EMBEDDED = ROOT / "models" / "capsnet-mnist" / "1"
DIGIT = pb.Image(encoded=(DATA / "seven.png").read_bytes())
QUICK = {"max_batch": 2, "runtimes": 1}
QUICK_FLAGS = ("--max-batch", "8", "--runtimes", "1", "--threads", "1")
PATIENCE = 10.0


def put(repository: Path, version: str = "1", name: str = "digits", graph: bytes | None = None) -> Path:
    """Write a version with the embedded model's graph, or another graph. Its labels name the version: ``7 of 1``."""
    folder = repository / name / version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / artifact.MODEL).write_bytes(graph or (EMBEDDED / artifact.MODEL).read_bytes())
    embedded = artifact.load(EMBEDDED)
    artifact.write_manifest(
        replace(
            embedded,
            folder=folder,
            name=name,
            version=version,
            labels=tuple(f"{label} of {version}" for label in embedded.labels),
            files={artifact.MODEL: artifact.digest(folder / artifact.MODEL)},
            variants={"fp32": embedded.variants["fp32"]},
            graphs={},
        )
    )
    return folder


def linear_graph(weights: NDArray[np.float32], classes: int = 10) -> bytes:
    """Return a graph of one layer with the network's input and outputs. weights: (784, 16 * classes)."""
    nodes = [
        helper.make_node("Cast", ["images"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["numbers"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weights"], ["capsules"]),
        helper.make_node("Reshape", ["capsules", "shape"], ["poses"]),
        helper.make_node("ReduceL2", ["poses", "axes"], ["probabilities"], keepdims=0),
    ]
    constants = [
        numpy_helper.from_array(weights, "weights"),
        numpy_helper.from_array(np.array([-1, classes, 16]), "shape"),
        numpy_helper.from_array(np.array([2]), "axes"),
    ]
    outputs = [
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["B", classes]),
        helper.make_tensor_value_info("poses", TensorProto.FLOAT, ["B", classes, 16]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", 1, 28, 28])
    graph = helper.make_graph(nodes, "linear", [images], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def another_graph() -> bytes:
    """Return the embedded model's graph in other bytes."""
    model = onnx.load(EMBEDDED / artifact.MODEL)
    model.doc_string = "another"
    data: bytes = model.SerializeToString()
    return data


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"not within {PATIENCE} s: {what}"
        time.sleep(0.02)


def label(running: Running, name: str = "", version: str = "") -> str:
    request = pb.ClassifyRequest(model_name=name, model_version=version, images=[DIGIT])
    text: str = running.stub.Classify(request, timeout=20).results[0].label
    return text


def refusal(running: Running, name: str = "", version: str = "") -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        label(running, name, version)
    return caught.value


def page(running: Running) -> str:
    with urllib.request.urlopen(running.metrics_url, timeout=10) as response:
        text: str = response.read().decode()
    return text


def failed_loads(running: Running) -> float:
    registry = running.server.metrics.registry
    return registry.get_sample_value("capsnet_model_loads_total", {"model": "digits", "result": "failed"}) or 0


def index(channel: grpc.Channel) -> dict[tuple[str, str], tuple[str, str]]:
    """Return (state, reason) by (name, version)."""
    stub = GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
    models = stub.RepositoryIndex(inference.RepositoryIndexRequest(), timeout=20).models
    return {(model.name, model.version): (model.state, model.reason) for model in models}


@contextmanager
def admin_of(running: Running) -> Iterator[GRPCInferenceServiceStub]:
    with grpc.insecure_channel(f"127.0.0.1:{running.server.admin_port}") as channel:
        yield GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]


def load(admin: GRPCInferenceServiceStub, name: str, **fields: Any) -> None:
    admin.RepositoryModelLoad(inference.RepositoryModelLoadRequest(model_name=name, **fields), timeout=20)


def unload(admin: GRPCInferenceServiceStub, name: str, **fields: Any) -> None:
    admin.RepositoryModelUnload(inference.RepositoryModelUnloadRequest(model_name=name, **fields), timeout=20)


def refused(call: Callable[..., None], *arguments: Any, **fields: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **fields)
    return caught.value.code(), caught.value.details() or ""


def test_several_models_and_versions_are_served_from_one_folder(start: Callable[..., Running], tmp_path: Path) -> None:
    for version, name in (("1", "digits"), ("2", "digits"), ("5", "others")):
        put(tmp_path, version, name)
    running = start(models=str(tmp_path), versions=2, **QUICK)
    assert [label(running, "digits", version) for version in ("1", "2", "")] == ["7 of 1", "7 of 2", "7 of 2"]
    assert label(running, "others") == label(running, "others", "5") == "7 of 5"
    response = running.stub.Classify(pb.ClassifyRequest(model_name="others", images=[DIGIT]), timeout=20)
    assert (response.model_name, response.model_version) == ("others", "5")
    assert index(running.channel) == {key: ("READY", "") for key in (("digits", "1"), ("digits", "2"), ("others", "5"))}
    for labels in ('model="digits",version="1"', 'model="digits",version="2"', 'model="others",version="5"'):
        assert f"capsnet_model_ready{{{labels}}} 1.0" in page(running)


def test_with_several_models_a_request_must_name_one(start: Callable[..., Running], tmp_path: Path) -> None:
    put(tmp_path)
    put(tmp_path, name="others")
    error = refusal(start(models=str(tmp_path), **QUICK))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    text = "empty; this server has several models: digits version 1, others version 1"
    assert error.details() == f"model_name: {text}"
    metadata: dict[str, Any] = dict(error.trailing_metadata() or ())  # type: ignore[arg-type]
    violations = BadRequest()
    assert Status.FromString(metadata["grpc-status-details-bin"]).details[0].Unpack(violations)
    assert [(one.field, one.description) for one in violations.field_violations] == [("model_name", text)]


def test_an_unknown_model_is_not_found_and_the_error_names_the_served_ones(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    put(tmp_path)
    running = start(models=str(tmp_path), **QUICK)
    for name, version in (("none", ""), ("digits", "3"), ("digits", "01"), ("", "3"), ("../digits", "")):
        error = refusal(running, name, version)
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert str(error.details()).endswith("is not served; there is: digits version 1")


def test_only_the_requested_number_of_highest_versions_is_served(start: Callable[..., Running], tmp_path: Path) -> None:
    for version in ("2", "9", "10"):
        put(tmp_path, version)
    (tmp_path / "digits" / "draft").mkdir()
    running = start(models=str(tmp_path), versions=2, poll_seconds=0.05, **QUICK)
    assert [label(running, version=version) for version in ("", "10", "9")] == ["7 of 10", "7 of 10", "7 of 9"]
    assert refusal(running, version="2").code() is grpc.StatusCode.NOT_FOUND
    put(tmp_path, "11")
    until(lambda: label(running) == "7 of 11", "version 11")
    until(lambda: ("digits", "9") not in index(running.channel), "the end of version 9")
    assert set(index(running.channel)) == {("digits", "11"), ("digits", "10")}


def test_a_new_version_is_picked_up_by_polling_and_the_series_of_the_old_one_vanish(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    put(tmp_path)
    running = start(models=str(tmp_path), poll_seconds=0.05, **QUICK)
    assert label(running) == "7 of 1"
    assert 'model="digits",version="1"' in page(running)
    put(tmp_path, "2")
    until(lambda: label(running) == "7 of 2", "version 2")
    until(lambda: 'version="1"' not in page(running), "the end of version 1's series")
    assert index(running.channel) == {("digits", "2"): ("READY", "")}
    assert 'capsnet_queue_seconds_count{graph="classify",model="digits",version="2"}' in page(running)


def test_without_polling_a_new_version_waits_for_a_sighup(tmp_path: Path) -> None:
    put(tmp_path)
    with (
        server_process("--models", str(tmp_path), "--poll-seconds", "0", *QUICK_FLAGS) as (process, address, _),
        grpc.insecure_channel(address) as channel,
    ):
        put(tmp_path, "2")
        time.sleep(0.3)
        assert index(channel) == {("digits", "1"): ("READY", "")}
        process.send_signal(signal.SIGHUP)
        until(lambda: index(channel) == {("digits", "2"): ("READY", "")}, "version 2")


def test_a_new_version_is_swapped_in_under_full_load_without_a_failed_request(tmp_path: Path) -> None:
    put(tmp_path)  # again below, which changes nothing
    with server_process("--models", str(tmp_path), "--poll-seconds", "0.1", *QUICK_FLAGS) as (process, address, _):
        seen = asyncio.run(_load_while_versions_change(tmp_path, address))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    for versions in seen:
        assert versions == sorted(versions), "once a client has met a version it meets no lower one"
        assert set(versions) == {"1", "2", "3"}


async def _load_while_versions_change(repository: Path, address: str) -> list[list[str]]:
    """Return the versions seen by each client: four with single images, two with eight a request, two streams."""
    seen: list[list[str]] = []

    def met(response: pb.ClassifyResponse, images: int, versions: list[str]) -> None:
        version = response.model_version
        assert [result.label for result in response.results] == [f"7 of {version}"] * images
        versions.append(version)

    async with grpc.aio.insecure_channel(address) as channel:
        stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
        stopping = asyncio.Event()

        async def unary(images: int) -> None:
            versions: list[str] = []
            seen.append(versions)
            while not stopping.is_set():
                met(await stub.Classify(pb.ClassifyRequest(images=[DIGIT] * images), timeout=20), images, versions)

        async def stream() -> None:
            versions: list[str] = []
            seen.append(versions)
            call = stub.ClassifyStream(timeout=60)
            request = pb.ClassifyStreamRequest(request=pb.ClassifyRequest(images=[DIGIT]))
            for _ in range(4):
                await call.write(request)
            while not stopping.is_set():
                met((await call.read()).response, 1, versions)
                await call.write(request)
            await call.done_writing()
            while (answer := await call.read()) is not grpc.aio.EOF:
                met(answer.response, 1, versions)
            assert await call.code() is grpc.StatusCode.OK

        clients = [
            asyncio.create_task(client)
            for client in (*(unary(images) for images in (1, 1, 1, 1, 8, 8)), stream(), stream())
        ]
        for served in ("1", "2", "3"):
            await asyncio.to_thread(put, repository, served)
            end = time.monotonic() + PATIENCE
            while len(seen) < len(clients) or not all(versions and versions[-1] == served for versions in seen):
                assert time.monotonic() < end, f"version {served} is not served"
                for client in clients:
                    if client.done():
                        await client
                await asyncio.sleep(0.02)
        stopping.set()
        await asyncio.gather(*clients)
    return seen


Spoil = Callable[[Path], object]


def _flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / artifact.MODEL).read_bytes())
    content[1000] ^= 1
    (folder / artifact.MODEL).write_bytes(content)


def _cut_the_manifest(folder: Path) -> None:
    os.truncate(folder / artifact.MANIFEST, 1000)


def _cut_the_manifest_and_digest_it(folder: Path) -> None:
    _cut_the_manifest(folder)
    digest = artifact.digest(folder / artifact.MANIFEST)
    (folder / artifact.MANIFEST_DIGEST).write_text(f"{digest}  {artifact.MANIFEST}\n")


def _take_anothers_manifest(folder: Path) -> None:
    for name in (artifact.MANIFEST, artifact.MANIFEST_DIGEST):
        shutil.copy(EMBEDDED / name, folder)


def _take_a_graph(folder: Path, graph: bytes) -> None:
    put(folder.parent.parent, folder.name, folder.parent.name, graph)


def _weights(value: float, classes: int = 10) -> NDArray[np.float32]:
    return np.full((784, 16 * classes), value, np.float32)


BAD: dict[str, tuple[Spoil, str]] = {
    "a changed byte": (_flip_a_byte, "digits/2/model.onnx: SHA-256 is "),
    "a manifest cut off": (_cut_the_manifest, "digits/2/manifest.json: SHA-256 is "),
    "a manifest that is no JSON": (_cut_the_manifest_and_digest_it, "digits/2/manifest.json: not readable as JSON"),
    "another's manifest": (_take_anothers_manifest, "name is 'capsnet-mnist'; expected the name of its folder"),
    "no graph": (lambda folder: (folder / artifact.MODEL).unlink(), "digits/2/model.onnx: not readable"),
    "no digest of the manifest": (
        lambda folder: (folder / artifact.MANIFEST_DIGEST).unlink(),
        "digits/2/manifest.sha256: not readable",
    ),
    "a graph that is none": (
        lambda folder: _take_a_graph(folder, b"no graph"),
        "digits/2/model.onnx: ONNX Runtime cannot load it",
    ),
    "answers that are not finite": (
        lambda folder: _take_a_graph(folder, linear_graph(_weights(np.nan))),
        "digits/2: in its self-test the graph answers with values that are not finite",
    ),
    "answers for nine classes": (
        lambda folder: _take_a_graph(folder, linear_graph(_weights(1e-6, 9), 9)),
        "answers poses (2, 9, 16) and probabilities (2, 9); its manifest says (2, 10, 16) and (2, 10)",
    ),
}


@pytest.mark.parametrize(("spoil", "reason"), BAD.values(), ids=BAD)
def test_a_bad_new_version_never_serves_until_it_is_repaired_in_place(
    start: Callable[..., Running], tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Spoil, reason: str
) -> None:
    good, bad, repository = (tmp_path / name for name in ("good", "bad", "repository"))
    put(good, "2")
    put(bad, "2")
    put(repository)
    spoil(bad / "digits" / "2")
    running = start(models=str(repository), poll_seconds=0.05, **QUICK)
    (bad / "digits" / "2").rename(repository / "digits" / "2")
    until(lambda: failed_loads(running), "an attempt to load version 2")
    time.sleep(0.2)
    assert failed_loads(running) == 1, "it is not tried again while nothing changes"
    assert label(running) == "7 of 1"
    assert refusal(running, version="2").code() is grpc.StatusCode.NOT_FOUND
    assert index(running.channel)["digits", "1"] == ("READY", "")
    state, told = index(running.channel)["digits", "2"]
    assert state == "UNAVAILABLE"
    assert reason in told
    assert str(tmp_path) not in told, "clients are not told where the repository lies"
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert [text for text in errors if "digits version 2 is not served: " in text and reason in text]
    copy_what_differs(good / "digits" / "2", repository / "digits" / "2")
    until(lambda: label(running) == "7 of 2", "version 2, repaired")
    until(lambda: index(running.channel) == {("digits", "2"): ("READY", "")}, "the end of version 1")


def copy_what_differs(source: Path, target: Path, pause: float = 0.0) -> None:
    """Copy the files in alphabetical order, each directly under its final name, as synchronisation tools do."""
    target.mkdir(exist_ok=True)
    for file in sorted(source.iterdir()):
        content, path = file.read_bytes(), target / file.name
        if not path.exists() or path.read_bytes() != content:
            partial = target / f".{file.name}"
            partial.write_bytes(content)
            partial.replace(path)
            time.sleep(pause)


def test_a_version_that_arrives_file_by_file_is_served_once_it_is_whole(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    put(repository)
    running = start(models=str(repository), poll_seconds=0.05, **QUICK)
    copy_what_differs(put(tmp_path, "2"), repository / "digits" / "2", pause=0.2)
    until(lambda: label(running) == "7 of 2", "version 2")


def test_a_bad_version_at_the_start_gives_way_to_the_next_lower_one(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    put(tmp_path, "1")
    put(tmp_path, "2")
    _flip_a_byte(put(tmp_path, "3"))
    running = start(models=str(tmp_path), **QUICK)
    assert label(running) == "7 of 2"
    assert {key: state for key, (state, _) in index(running.channel).items()} == {
        ("digits", "2"): "READY",
        ("digits", "3"): "UNAVAILABLE",
    }
    assert failed_loads(running) == 1


def test_a_model_that_is_bad_in_all_versions_leaves_the_others_serving(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    put(tmp_path, name="others")
    _flip_a_byte(put(tmp_path))
    running = start(models=str(tmp_path), **QUICK)
    assert label(running, "others") == "7 of 1"
    assert refusal(running, "digits").code() is grpc.StatusCode.NOT_FOUND


def test_without_one_good_version_the_server_does_not_start_and_says_why(tmp_path: Path) -> None:
    for version in ("1", "2"):
        _flip_a_byte(put(tmp_path, version))
    code, text = failed_start("--models", str(tmp_path), *QUICK_FLAGS)
    assert code == 1
    assert f"cannot start: {tmp_path}/digits/2/model.onnx: SHA-256 is" in text
    assert "Traceback" not in text


def test_versions_that_are_no_numbers_are_reported_at_the_start(tmp_path: Path) -> None:
    put(tmp_path, "latest")
    code, text = failed_start("--models", str(tmp_path), *QUICK_FLAGS)
    assert code == 1
    assert "Traceback" not in text
    assert "cannot start: " in text
    assert "no version (a number)" in text


def test_a_change_in_the_folder_that_is_served_is_served(start: Callable[..., Running], tmp_path: Path) -> None:
    put(tmp_path)
    running = start(models=str(tmp_path), poll_seconds=0.05, **QUICK)
    old = running.model.artifact.sha256()
    put(tmp_path, graph=another_graph())
    until(lambda: running.model.artifact.sha256() != old, "the changed version 1")
    assert label(running) == "7 of 1"
    assert index(running.channel) == {("digits", "1"): ("READY", "")}
    text = page(running)
    assert f'sha256="{running.model.artifact.sha256()}"' in text
    assert 'capsnet_queue_seconds_count{graph="classify",model="digits",version="1"}' in text
    until(lambda: old not in page(running), "the end of the series of the graph before")


def test_a_bad_change_in_the_folder_that_is_served_harms_nobody(start: Callable[..., Running], tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    put(repository)
    running = start(models=str(repository), poll_seconds=0.05, admin_port=0, **QUICK)
    old = running.model.artifact.sha256()
    changed = put(tmp_path, graph=another_graph())
    shutil.copy(changed / artifact.MANIFEST_DIGEST, repository / "digits" / "1")
    shutil.copy(changed / artifact.MANIFEST, repository / "digits" / "1")
    wrong = "digits/1/model.onnx: SHA-256 is"  # a look amid a copy finds fault with the manifest
    until(lambda: wrong in index(running.channel)["digits", "1"][1], "an attempt to load the changed version")
    assert label(running) == "7 of 1"
    assert failed_loads(running) >= 1
    assert index(running.channel)["digits", "1"][0] == "READY"
    copy_what_differs(changed, repository / "digits" / "1")
    until(lambda: running.model.artifact.sha256() != old, "the changed version 1, whole")
    until(lambda: index(running.channel) == {("digits", "1"): ("READY", "")}, "a clean index")


def test_other_files_in_a_served_folder_do_not_reload_it(start: Callable[..., Running], tmp_path: Path) -> None:
    folder = put(tmp_path)
    running = start(models=str(tmp_path), poll_seconds=0.0, admin_port=0, **QUICK)
    model = running.model
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "._manifest.json"):
        (folder / name).write_text("a system's, or an editor's")
        (tmp_path / name).write_text("a system's, or an editor's")
    (folder / "folder").mkdir()
    with admin_of(running) as admin:
        load(admin, "digits")  # check the folder at once
        assert running.model is model
        os.utime(folder / artifact.MODEL, ns=(1, 1))
        load(admin, "digits")
        assert running.model is not model


def test_hidden_folders_are_no_models(start: Callable[..., Running], tmp_path: Path) -> None:
    put(tmp_path)
    put(tmp_path, name=".trash")
    running = start(models=str(tmp_path), poll_seconds=0.0, **QUICK)
    assert index(running.channel) == {("digits", "1"): ("READY", "")}
    shutil.rmtree(tmp_path / "digits")
    code, text = failed_start("--models", str(tmp_path), *QUICK_FLAGS)
    assert code == 1
    assert f"cannot start: {tmp_path}: no model there" in text
    assert "Traceback" not in text


def test_names_that_would_write_into_the_log_are_not_served(
    start: Callable[..., Running], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path)
    for name in ("fake\nERROR line", "x" * 129):
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "1" / artifact.MANIFEST).write_text("{}")
    for version in ("01", "\u0661"):  # other spellings of 1
        (tmp_path / "digits" / version).mkdir()
        (tmp_path / "digits" / version / artifact.MANIFEST).write_text("{}")
    running = start(models=str(tmp_path), poll_seconds=0.02, **QUICK)
    assert [(entry.name, entry.version) for entry in running.server.repository.index()] == [("digits", "1")]
    refusals = [
        record.getMessage() for record in caplog.records if "is not served: a model's name" in record.getMessage()
    ]
    assert len(refusals) == 2
    assert refusals[0].startswith(r"'fake\nERROR line' is not served")


def test_a_model_that_is_swapped_between_its_verification_and_its_opening_does_not_serve(
    start: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path)
    running = start(models=str(tmp_path), poll_seconds=0.0, admin_port=0, **QUICK)
    folder = put(tmp_path, "2")
    verify = artifact.load

    def load_and_swap(folder: Path, max_file_bytes: int) -> artifact.Artifact:
        verified = verify(folder, max_file_bytes)
        (folder / artifact.MODEL).write_bytes(b"another graph")
        return verified

    monkeypatch.setattr(artifact, "load", load_and_swap)
    with admin_of(running) as admin:
        load(admin, "digits")
    (entry,) = [entry for entry in running.server.repository.index() if entry.version == "2"]
    assert entry.reason.startswith("digits/2/model.onnx: SHA-256 is ")
    assert (folder / artifact.MODEL).read_bytes() == b"another graph"
    assert label(running) == "7 of 1"


def test_a_model_above_a_limit_is_refused_with_the_settings_name(start: Callable[..., Running], tmp_path: Path) -> None:
    put(tmp_path)
    with pytest.raises(
        ArtifactError, match=r"model\.onnx: not readable: \d+ bytes; the limit is 65536 bytes \(max_model_bytes\)"
    ):
        start(models=str(tmp_path), max_model_bytes=65536, **QUICK)


@pytest.mark.parametrize("by", ["polling", "loading"])
def test_a_model_that_could_not_be_loaded_and_is_gone_is_forgotten(
    start: Callable[..., Running], tmp_path: Path, by: str
) -> None:
    put(tmp_path)
    running = start(models=str(tmp_path), poll_seconds=0.05 if by == "polling" else 0.0, admin_port=0, **QUICK)
    _flip_a_byte(put(tmp_path, name="others"))
    with admin_of(running) as admin:
        if by == "loading":
            assert "cannot be served" in refused(load, admin, "others")[1]
        until(lambda: ("others", "1") in index(running.channel), "the attempt to load it")
        shutil.rmtree(tmp_path / "others")
        if by == "loading":
            assert refused(load, admin, "others")[1] == "model_name: 'others' is not there"
        until(lambda: index(running.channel) == {("digits", "1"): ("READY", "")}, "its end in the index")


def test_one_of_two_versions_that_is_removed_goes(start: Callable[..., Running], tmp_path: Path) -> None:
    put(tmp_path, "1")
    put(tmp_path, "2")
    running = start(models=str(tmp_path), versions=2, poll_seconds=0.05, **QUICK)
    shutil.rmtree(tmp_path / "digits" / "2")
    until(lambda: index(running.channel) == {("digits", "1"): ("READY", "")}, "the end of version 2")
    assert label(running) == "7 of 1"
    assert refusal(running, version="2").code() is grpc.StatusCode.NOT_FOUND
    assert 'version="2"' not in page(running)


def test_a_removed_version_gives_way_to_the_next_lower_one(start: Callable[..., Running], tmp_path: Path) -> None:
    put(tmp_path, "1")
    put(tmp_path, "2")
    running = start(models=str(tmp_path), poll_seconds=0.05, **QUICK)
    assert label(running) == "7 of 2"
    shutil.rmtree(tmp_path / "digits" / "2")
    until(lambda: label(running) == "7 of 1", "version 1")


@pytest.mark.parametrize("gone", ["digits/1", "digits", "."])
def test_the_last_version_stays_when_its_folder_is_removed_and_the_log_says_so_once(
    start: Callable[..., Running], tmp_path: Path, caplog: pytest.LogCaptureFixture, gone: str
) -> None:
    repository = tmp_path / "repository"
    put(repository)
    running = start(models=str(repository), poll_seconds=0.05, **QUICK)
    shutil.rmtree(repository / gone)

    def told() -> int:
        return sum("digits: no version in its folder can be served" in text for text in caplog.messages)

    until(told, "a line about it")
    time.sleep(0.3)
    assert label(running) == "7 of 1"
    assert index(running.channel) == {("digits", "1"): ("READY", "")}
    assert told() == 1, "not at every look"
    put(repository, "2")
    until(lambda: label(running) == "7 of 2", "version 2")


def test_the_admin_port_loads_and_unloads(start: Callable[..., Running], tmp_path: Path) -> None:
    put(tmp_path)
    running = start(models=str(tmp_path), poll_seconds=0.05, admin_port=0, **QUICK)
    with admin_of(running) as admin:
        unload(admin, "digits")
        assert refusal(running).code() is grpc.StatusCode.NOT_FOUND
        assert refusal(running).details() == "model_name, model_version: '' is not served; there is: none"
        time.sleep(0.2)
        assert refusal(running, "digits").code() is grpc.StatusCode.NOT_FOUND, "polling does not bring it back"
        assert 'model="digits",version="1"' not in page(running)
        stub = GRPCInferenceServiceStub(running.channel)  # type: ignore[no-untyped-call]
        assert not stub.ServerReady(inference.ServerReadyRequest(), timeout=20).ready
        put(tmp_path, "2")
        load(admin, "digits")
        assert label(running) == "7 of 2"
        load(admin, "digits")
        assert label(running) == "7 of 2"
        put(tmp_path, name="others")
        load(admin, "others")
        assert label(running, "others") == "7 of 1"


def test_loading_a_bad_or_missing_model_is_refused_with_the_reason_and_retried_each_time(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    put(tmp_path, name="others")
    running = start(models=str(tmp_path), poll_seconds=0.0, admin_port=0, **QUICK)
    folder = put(tmp_path)
    whole = (folder / artifact.MODEL).read_bytes()
    _flip_a_byte(folder)
    with admin_of(running) as admin:
        code, text = refused(load, admin, "digits")
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "model_name: 'digits' cannot be served: digits/1/model.onnx: SHA-256 is" in text
        assert str(tmp_path) not in text
        code, text = refused(load, admin, "nothing")
        assert (code, text) == (grpc.StatusCode.INVALID_ARGUMENT, "model_name: 'nothing' is not there")
        code, text = refused(unload, admin, "nothing")
        assert code is grpc.StatusCode.NOT_FOUND
        (folder / artifact.MODEL).write_bytes(whole)
        load(admin, "digits")
    assert label(running, "digits") == "7 of 1"


def test_names_that_lead_elsewhere_are_refused(start: Callable[..., Running], tmp_path: Path) -> None:
    put(tmp_path / "repository")
    put(tmp_path)
    running = start(models=str(tmp_path / "repository"), poll_seconds=0.0, admin_port=0, **QUICK)
    with admin_of(running) as admin:
        for name in ("", ".", "..", "../digits", "a/b", "/etc", "digits/1", "digits\0"):
            for method in (load, unload):
                code, text = refused(method, admin, name)
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert text == f"model_name: {name!r}; expected the name of a folder in the repository"
    assert label(running) == "7 of 1"


def test_names_of_nothing_are_not_there(start: Callable[..., Running], tmp_path: Path) -> None:
    put(tmp_path)
    running = start(models=str(tmp_path), poll_seconds=0.0, admin_port=0, **QUICK)
    with admin_of(running) as admin:
        for name in ("*", "**", "[d]igits", "digits*", "~", "x" * 60_000, "\x1b[31mred\n", "é"):
            code, text = refused(load, admin, name)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert text == f"model_name: {name[:64]!r} is not there"
            assert refused(unload, admin, name)[0] is grpc.StatusCode.NOT_FOUND
        code, text = refused(unload, admin, "x" * 100_000)
        assert code is grpc.StatusCode.INVALID_ARGUMENT and "65536" in text, "a request of a name alone may have less"
    assert label(running) == "7 of 1"


def test_a_model_comes_from_its_folder_and_not_from_a_load_request(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    put(tmp_path)
    running = start(models=str(tmp_path), poll_seconds=0.0, admin_port=0, **QUICK)
    with admin_of(running) as admin:
        for name in ("config", "file:1/model.onnx"):
            parameters = {name: inference.ModelRepositoryParameter(string_param="{}")}
            code, text = refused(load, admin, "digits", parameters=parameters)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert f'parameters["{name}"]: not supported' in text
        for method in (load, unload):
            code, text = refused(method, admin, "digits", repository_name="elsewhere")
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "repository_name: 'elsewhere'" in text
    assert label(running) == "7 of 1"


def test_the_admin_methods_are_on_a_port_of_their_own_and_by_default_on_none(start: Callable[..., Running]) -> None:
    running = start(**QUICK)
    assert running.server.admin_port == 0
    stub = GRPCInferenceServiceStub(running.channel)  # type: ignore[no-untyped-call]
    for method in (load, unload):
        assert refused(method, stub, "capsnet-mnist")[0] is grpc.StatusCode.UNIMPLEMENTED
    assert "model_repository" not in stub.ServerMetadata(inference.ServerMetadataRequest(), timeout=20).extensions
    running = start(admin_port=0, **QUICK)
    stub = GRPCInferenceServiceStub(running.channel)  # type: ignore[no-untyped-call]
    for method in (load, unload):
        assert refused(method, stub, "capsnet-mnist")[0] is grpc.StatusCode.UNIMPLEMENTED
    with admin_of(running) as admin, pytest.raises(grpc.RpcError) as caught:
        admin.ModelInfer(inference.ModelInferRequest(), timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def _hold(model: ServedModel) -> tuple[threading.Event, threading.Event]:
    """Hold the model's next batches. Return two events: a batch has begun, and let them go."""
    run, begun, go = model.classify.batcher._run, threading.Event(), threading.Event()

    def held(arrays: Arrays) -> Arrays:
        begun.set()
        assert go.wait(PATIENCE)
        return run(arrays)

    model.classify.batcher._run = held
    return begun, go


def test_an_unloaded_model_answers_its_accepted_requests(start: Callable[..., Running], tmp_path: Path) -> None:
    put(tmp_path)
    running = start(models=str(tmp_path), poll_seconds=0.0, admin_port=0, **QUICK)
    begun, go = _hold(running.model)
    call = running.stub.Classify.future(pb.ClassifyRequest(images=[DIGIT]), timeout=20)
    assert begun.wait(PATIENCE)
    with admin_of(running) as admin:
        unload(admin, "digits")
        assert refusal(running).code() is grpc.StatusCode.NOT_FOUND
        assert index(running.channel) == {("digits", "1"): ("UNLOADING", "")}
        go.set()
        assert call.result().results[0].label == "7 of 1"
        until(lambda: not index(running.channel), "the end of version 1")


def test_a_model_that_is_loaded_again_while_it_still_goes_serves_on(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    put(tmp_path)
    running = start(models=str(tmp_path), poll_seconds=0.0, admin_port=0, **QUICK)
    begun, go = _hold(running.model)
    call = running.stub.Classify.future(pb.ClassifyRequest(images=[DIGIT]), timeout=20)
    assert begun.wait(PATIENCE)
    with admin_of(running) as admin:
        unload(admin, "digits")
        load(admin, "digits")
    go.set()
    assert call.result().results[0].label == "7 of 1"
    time.sleep(0.2)
    assert [label(running) for _ in range(3)] == ["7 of 1"] * 3
    assert index(running.channel) == {("digits", "1"): ("READY", "")}
    assert 'capsnet_model_ready{model="digits",version="1"} 1.0' in page(running)


def test_an_unloaded_model_frees_its_memory_without_the_garbage_collector(
    start: Callable[..., Running], tmp_path: Path, no_collection: None
) -> None:
    put(tmp_path)
    running = start(models=str(tmp_path), poll_seconds=0.0, admin_port=0, **QUICK)
    assert label(running) == "7 of 1"
    runtime = weakref.ref(running.model.classify.runtime)
    with admin_of(running) as admin:
        unload(admin, "digits")
        until(lambda: runtime() is None, "the end of the runtime")


def test_a_load_whose_client_has_gone_does_not_keep_a_version_from_being_served(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    put(tmp_path)
    running = start(models=str(tmp_path), poll_seconds=0.2, admin_port=0, max_model_bytes=2 * HUGE_BYTES, **QUICK)
    file = put_a_huge_file(tmp_path, "2")
    with admin_of(running) as admin:
        call = admin.RepositoryModelLoad.future(inference.RepositoryModelLoadRequest(model_name="digits"), timeout=20)
        until_read(os.getpid(), file)
        assert index(running.channel)["digits", "2"] == ("LOADING", "")
        call.cancel()
        time.sleep(0.1)
        file.write_bytes((EMBEDDED / artifact.MODEL).read_bytes())
        until(lambda: label(running) == "7 of 2", "version 2")


HUGE_BYTES = 2**40
HUGE_FLAGS = (*QUICK_FLAGS, "--max-model-bytes", str(2 * HUGE_BYTES))


def put_a_huge_file(repository: Path, version: str = "1") -> Path:
    """Put a version whose load lasts as long as a test, since its graph has a terabyte. Return the graph's file."""
    folder = put(repository / "prepared", version)
    os.truncate(folder / artifact.MODEL, HUGE_BYTES)  # of zeros that take no room
    (repository / "digits").mkdir(exist_ok=True)
    folder.rename(repository / "digits" / version)
    shutil.rmtree(repository / "prepared")
    return repository / "digits" / version / artifact.MODEL


def until_read(process: int, file: Path) -> None:
    """Wait until a process has opened a file."""

    def opened() -> bool:
        with suppress(FileNotFoundError):  # another file is closed
            return any(descriptor.readlink() == file for descriptor in Path(f"/proc/{process}/fd").iterdir())
        return False

    until(opened, f"reading {file}")


def starting(repository: Path) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-m",
        "serving",
        "--port",
        "0",
        "--metrics-port",
        "0",
        "--http-port",
        "-1",
        "--models",
        str(repository),
    ]
    return subprocess.Popen([*command, *HUGE_FLAGS], stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_sigterm_while_the_models_are_loaded_ends_the_server_at_once(tmp_path: Path) -> None:
    file = put_a_huge_file(tmp_path)
    with starting(tmp_path) as process:
        try:
            until_read(process.pid, file)
            process.send_signal(signal.SIGTERM)
            assert process.wait(3) == 0
        finally:
            process.kill()


def test_a_sighup_while_the_models_are_loaded_harms_nothing(tmp_path: Path) -> None:
    file = put_a_huge_file(tmp_path)
    with starting(tmp_path) as process:
        try:
            until_read(process.pid, file)
            process.send_signal(signal.SIGHUP)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.3)
        finally:
            process.kill()


@pytest.mark.parametrize("by", ["polling", "a signal"])
def test_sigterm_while_a_new_version_is_loaded_does_not_wait_for_it(tmp_path: Path, by: str) -> None:
    put(tmp_path)
    seconds = "0.1" if by == "polling" else "0"
    with server_process("--models", str(tmp_path), "--poll-seconds", seconds, *HUGE_FLAGS) as (process, _, _):
        file = put_a_huge_file(tmp_path, "2")
        if by == "a signal":
            process.send_signal(signal.SIGHUP)
        until_read(process.pid, file)
        process.send_signal(signal.SIGTERM)
        assert process.wait(3) == 0


def test_answers_that_wait_for_their_client_cost_it_turns() -> None:
    batcher = Mock()
    model = SimpleNamespace(graphs={"classify": SimpleNamespace(batcher=batcher)})
    repository: Any = SimpleNamespace(models=lambda: [model])
    for rows in (1, 64, -65):
        Repository.note_unread(repository, "client", rows)
    held = [call.args for call in batcher.hold_back.call_args_list]
    assert held == [("client", 15), ("client", 15 * 64), ("client", -15 * 65)]
