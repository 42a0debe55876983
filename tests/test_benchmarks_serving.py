"""Tests of the serving benchmarks: loads account for every call, and short runs end with sane figures."""

import csv
import gzip
import re
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from benchmarks import beside, load, overload, scrape, server, serving, serving_picture, start, tricks
from benchmarks.load import Flood, LoadError, Probes, Sample, flood, framed, in_streams, probe
from benchmarks.server import SERVICE, Case, Page, Served
from benchmarks.serving import Collected, Raw, RawSample, figures
from benchmarks.serving_picture import plot
from benchmarks.tricks import Figures, Gain
from benchmarks.without import LOADS, OVERLOAD, REFUSALS, TRICKS
from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.capsnet.v1.capsnet_pb2_grpc import CapsNetServiceStub
from tests import graphs
from tests.conftest import ROOT, Running
from tests.raw_client import wait_for
from training.model import CONFIGS, CapsNetConfig

needs_h2load = pytest.mark.skipif(not shutil.which(load.H2LOAD), reason=load.H2LOAD_MISSING)
IMAGE = pb.Image(pixels=bytes(784))
RESULTS = ROOT / "benchmarks" / "results"


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize(("streams", "images"), [(1, 1), (3, 1), (2, 64)])
def test_every_message_of_a_stream_is_answered(running: Running, streams: int, images: int) -> None:
    request = pb.ClassifyStreamRequest(request=pb.ClassifyRequest(images=[IMAGE] * images))
    body = framed(request.SerializeToString())
    sample = in_streams(running.address, f"{SERVICE}/ClassifyStream", body, streams, 8, 0.2)
    assert sample.requests >= streams
    p50, p95, p99 = sample.percentiles_ms
    assert 0 < p50 <= p95 <= p99 < 1000 * sample.seconds


def test_a_stream_that_answers_with_an_error_is_refused(running: Running) -> None:
    with pytest.raises(LoadError, match=r"a stream answered with an error: .*images: "):
        in_streams(running.address, f"{SERVICE}/ClassifyStream", framed(b"\x12\x00"), 1, 4, 0.2)


def test_probes_come_at_their_rate_and_each_is_accounted_for(running: Running) -> None:
    body = framed(pb.ClassifyRequest(images=[IMAGE]).SerializeToString())
    probes = probe(running.address, f"{SERVICE}/Classify", body, 100, 0.5, 10)
    assert {code: len(several) for code, several in probes.latencies_ms.items()} == {0: 50}
    assert (probes.calls, probes.expired) == (50, 0)


def test_refusals_are_distinguished_by_their_status(running: Running) -> None:
    body = framed(pb.ClassifyRequest().SerializeToString())
    probes = probe(running.address, f"{SERVICE}/Classify", body, 100, 0.2, 10)
    invalid = grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert {code: len(several) for code, several in probes.latencies_ms.items()} == {invalid: 20}


@pytest.mark.server
@needs_h2load
def test_a_flood_comes_at_its_rate_and_is_answered_in_full(running: Running, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(framed(pb.ClassifyRequest(images=[IMAGE]).SerializeToString()))
    flooded = flood(running.address, f"{SERVICE}/Classify", body, 200, 100, 10)
    assert (flooded.calls, len(flooded.latencies_ms)) == (100, 100)
    assert flooded.rate == pytest.approx(200, rel=0.1)
    assert flooded.seconds == pytest.approx(0.5, rel=0.2)
    assert 0 < flooded.latencies_ms.max() < 1000


def test_late_answers_are_not_counted_as_goodput() -> None:
    flooded = Flood(900, 90.0, 10.0, np.array([*[1.0] * 600, *[800.0] * 290, *[1001.0] * 10]))
    probed = Probes(100, 2, {0: [700.0] * 30, 4: [1.0, 2.0, 3.0]})
    row = overload.figures(flooded, probed, {"OK": 312, "DEADLINE_EXCEEDED": 688}, 1.0, 30, 50)
    assert (row["goodput_per_second"], row["goodput_share"], row["late"]) == ("30", "0.75", 12)
    assert (row["calls"], row["offered_per_second"]) == (1000, "100")
    assert (row["refused_p50_ms"], row["flood_refused_p50_ms"], row["accepted_p99_ms"]) == ("2", "1", "700")
    row = overload.figures(flooded, Probes(100, 0, {0: [700.0] * 100}), {"OK": 1000}, 1.0, 30, 50)
    assert (row["goodput_per_second"], row["refused_p50_ms"], row["flood_refused_p50_ms"]) == ("99", "", "")


@contextmanager
def silent(most_streams: int) -> Iterator[str]:
    """Yield the address of a server that sends its HTTP/2 settings, with its stream limit, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            link, _ = listener.accept()
            with link:
                link.sendall(b"\x00\x00\x06\x04\x00\x00\x00\x00\x00" + struct.pack(">HI", 3, most_streams))
                while link.recv(65536):
                    pass

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_calls_without_an_answer_expire() -> None:
    with silent(100) as address:
        probes = probe(address, f"{SERVICE}/Classify", framed(b""), 100, 0.1, 0.2)
    assert (probes.calls, probes.expired, probes.latencies_ms) == (10, 10, {})


def test_calls_that_the_server_keeps_back_are_an_error() -> None:
    with silent(3) as address, pytest.raises(LoadError, match="does not let this client open more than 3 calls"):
        probe(address, f"{SERVICE}/Classify", framed(b""), 100, 0.1, 0.2)


def page(**values: float) -> Page:
    return Page(tuple((name, {"grpc_method": "Classify"}, value) for name, value in values.items()))


BEFORE = page(
    process_cpu_seconds_total=1, capsnet_batch_size_images_sum=0, capsnet_batch_size_images_count=0,
    capsnet_decode_seconds_sum=0, capsnet_encode_seconds_sum=0, capsnet_queue_seconds_sum=0,
    capsnet_queue_seconds_count=0, capsnet_inference_seconds_sum=0, grpc_server_handling_seconds_sum=0,
)  # fmt: skip
AFTER = page(
    process_cpu_seconds_total=2, capsnet_batch_size_images_sum=1000, capsnet_batch_size_images_count=100,
    capsnet_decode_seconds_sum=0.1, capsnet_encode_seconds_sum=0.2, capsnet_queue_seconds_sum=3,
    capsnet_queue_seconds_count=1000, capsnet_inference_seconds_sum=0.5, grpc_server_handling_seconds_sum=4,
)  # fmt: skip
ONE, TEN = RawSample(1000, 0.001, 1.0), RawSample(2000, 0.004, 5.0)


def test_the_parts_of_the_cpu_time_add_up_to_the_whole() -> None:
    sample = Sample(1000, 2.0, (3.0, 4.0, 5.0), 0.1)
    values = figures(Case(1), sample, BEFORE, AFTER, ONE, TEN, 10)
    assert values["images_per_second"] == 500
    assert values["mean_batch"] == 10
    assert values["infer_us"] == pytest.approx(400)
    assert [values[f"{part}_us"] for part in ("decode", "encode", "grpc", "cpu")] == pytest.approx(
        [100, 200, 300, 1000]
    )
    assert values["queue_ms"] == 3
    assert values["overhead_p50_ms"] == 2
    assert values["server_overhead_ms"] == pytest.approx(4 - 5)


def test_figures_that_the_metrics_lack_are_left_out() -> None:
    sample = Sample(1000, 2.0, (3.0, 4.0, 5.0), 0.1)
    values = figures(Case(2), sample, page(), page(), ONE, TEN, 10)
    names = {"requests_per_second", "images_per_second", "p50_ms", "p95_ms", "p99_ms", "client_cpu_us"}
    assert set(values) == names


def test_shares_of_the_ceiling_are_taken_in_each_round() -> None:
    collected = Collected()
    collected.ceilings = {Raw(1, 2, 8): [10, 20, 40], Raw(2, 1, 8): [11, 12, 13]}
    for number, speed in enumerate((5, 11, 24)):
        collected.add(("ours", "tcp", "load"), number, {"images_per_second": speed})
    rows = dict(collected.medians())
    assert rows["onnxruntime", "", "ceiling: 2 threads, batches of 8"]["images_per_second"] == "20"
    assert rows["ours", "tcp", "load"] == {"images_per_second": "11", "share_of_ceiling": "0.55"}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CapsNetConfig(image_size=20, classes=3, conv_channels=4, primary_types=2, decoder_widths=())
    monkeypatch.setitem(CONFIGS, "tiny", config)
    monkeypatch.setattr(server, "to_onnx", lambda network: graphs.exported(network.config))
    for benchmark in (server, overload):  # a busy machine may count late what has been answered
        monkeypatch.setattr(benchmark, "_SETTLE_SECONDS", 30)
    monkeypatch.setattr(serving, "CASES", (Case(1), Case(4, images=2), Case(4, streams=2)))


SETTINGS = "--settings=--threads 1 --max-batch 8"


@pytest.mark.server
@needs_h2load
def test_the_server_is_measured_beside_onnx_runtime(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "serving.csv", tmp_path / "serving.png"
    arguments = ["--configs=tiny", "--rounds=2", "--seconds=0.05", SETTINGS, f"--out={out}", f"--plot={picture}"]
    assert serving.main([*arguments, "--transports", "tcp", "unix", "tls"]) == 0
    rows = read(out)
    loads = {one: [row["load"] for row in rows if row["transport"] == one] for one in serving.TRANSPORTS}
    unary = ["unary, 1 in flight", "unary, 4 in flight, 2 images each"]
    streamed = [*unary, "2 streams, 4 in flight"]
    assert loads == {"tcp": streamed, "unix": streamed, "tls": unary}
    measured = [row for row in rows if not row["not_run"]]
    assert {row["server"] for row in measured} == {"ours", "onnxruntime"}
    for row in measured:
        assert float(row["images_per_second"]) > 0
        assert float(row["share_of_ceiling"]) > 0
        assert (row["config"], row["threads"], row["max_batch"], row["rounds"]) == ("tiny", "1", "8", "2")
        if row["server"] == "ours":
            assert 0 < float(row["p50_ms"]) <= float(row["p95_ms"]) <= float(row["p99_ms"])
            assert float(row["cpu_us"]) >= 0
    assert measured[0]["load"].startswith("ceiling: ") and measured[0]["share_of_ceiling"] == "1"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "tiny (fp32)" in capsys.readouterr().out


def test_the_picture_has_a_colour_for_each_server_and_names_the_ceiling(tmp_path: Path) -> None:
    file, picture = RESULTS / "serving-cpu.csv", tmp_path / "serving.png"
    figure = plot(read(file))
    servers, parts = figure.legends
    assert [text.get_text() for text in servers.get_texts()] == [
        "this server, TCP", "this server, Unix socket", "mosec",
    ]  # fmt: skip
    assert len(parts.get_texts()) == 3
    speeds = figure.axes[0]
    colours = {bar.get_facecolor() for bar in speeds.patches}
    assert colours == {handle.get_facecolor() for handle in servers.get_patches()}
    texts = [text.get_text() for text in speeds.texts]
    assert "ceiling:\nONNX Runtime\nalone, 3,511\nimages a second" in texts
    assert {"664", "2,113"} <= {*texts}
    assert [label.get_text() for label in speeds.get_yticklabels()][:2] == ["unary, 1 in flight", "unary, 16 in flight"]
    assert serving_picture.main([str(file), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_figures_that_are_not_there_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serving_picture.main([str(tmp_path / "none.csv"), str(tmp_path / "a.png")]) == 1
    assert capsys.readouterr().err == f"{tmp_path / 'none.csv'}: No such file or directory\n"


@pytest.mark.server
@needs_h2load
def test_calls_that_the_server_refuses_end_the_measurement(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = server.write_bodies
    monkeypatch.setattr(server, "write_bodies", lambda folder, shape, cases: honest(folder, (1, 5, 5), cases))
    monkeypatch.setattr(server, "_SETTLE_SECONDS", 0.5)
    assert serving.main(["--configs=tiny", "--rounds=1", "--seconds=0.05", SETTINGS]) == 1
    assert re.search(r"tiny: Classify: \d calls ended with OK", capsys.readouterr().err)


@pytest.mark.server
@needs_h2load
def test_an_overload_is_measured_in_terms_of_the_capacity(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the tiny network a server computes so much that on a busy machine no client can send more.
    monkeypatch.setitem(CONFIGS, "compact", replace(CONFIGS["compact"], decoder_widths=()))
    out = tmp_path / "overload.csv"
    arguments = ["--configs=compact", "--seconds=1", "--times=1.5", "--deadline=5", SETTINGS, f"--out={out}"]
    assert overload.main(arguments) == 0
    (row,) = read(out)
    assert float(row["capacity_before"]) > 0
    assert float(row["memory_before_mib"]) > 0
    assert sum(map(int, re.findall(r"\d+", row["answers"]))) == int(row["calls"])
    assert int(row["probes_accepted"]) + int(row["probes_refused"]) <= int(row["calls"]) / 10 + 1
    assert float(row["goodput_per_second"]) > 0
    assert float(row["offered_per_second"]) == pytest.approx(1.5 * float(row["capacity_before"]), rel=0.05)


def sample(requests_per_second: int) -> Sample:
    return Sample(requests_per_second, 1.0, (3.0, 4.0, 5.0), 0.1)


def test_the_cost_of_scraping_is_computed_in_each_round_and_scaled_by_the_number_of_scrapes() -> None:
    collected = scrape.Collected(
        unscraped=[(sample(990), sample(1010)), (sample(490), sample(510)), (sample(100), sample(100))],
        scraped={1.0: [sample(1000), sample(495), sample(98)], 0.1: [sample(900), sample(460), sample(90)]},
        scrape_ms={1.0: [7, 8, 9], 0.1: [1, 2, 3]},
        cpu_seconds=[0.004, 0.006, 0.005],
    )
    nobody, every_second, often, usual = collected.rows()
    assert (nobody["interval_s"], nobody["requests_per_second"], nobody["ratio"]) == ("", "500", "1.02")
    assert (every_second["ratio"], every_second["ratio_least"], every_second["ratio_most"]) == ("0.99", "0.98", "1")
    assert (every_second["loss"], every_second["loss_scaled"], every_second["cpu_share"]) == ("0.01", "0.01", "0.005")
    assert (often["loss"], often["loss_scaled"], often["cpu_share"]) == ("0.1", "0.1", "0.05")
    assert (often["scrape_p50_ms"], often["p99_ms"]) == ("2", "5")
    assert usual == {"interval_s": "15", "loss_scaled": "0.000667", "cpu_share": "0.000333"}


def served(running: Running, metrics_url: str) -> Served:
    return Served(None, {"tcp": running.address}, metrics_url, Path("unused"), 0.0)  # type: ignore[arg-type]


def test_a_scraper_fetches_at_once_and_then_at_its_interval(running: Running) -> None:
    begin = time.monotonic()
    with scrape.scraping(served(running, running.metrics_url), 0.05) as milliseconds:
        wait_for(lambda: len(milliseconds) >= 5)
    count = len(milliseconds)
    assert count <= 1 + (time.monotonic() - begin) / 0.05
    assert min(milliseconds) > 0
    time.sleep(0.1)
    assert len(milliseconds) == count


def test_a_scraper_asks_as_prometheus_does_and_gets_the_page_that_a_browser_gets(running: Running) -> None:
    answering = served(running, running.metrics_url)
    page, compressed = answering.fetch(), answering.fetch(scrape.HEADERS)
    assert len(compressed) < len(page) / 2
    assert b"grpc_server_handled_total" in gzip.decompress(compressed) and b"grpc_server_handled_total" in page


def test_a_scrape_that_fails_ends_the_measurement(running: Running) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    nowhere = served(running, f"http://127.0.0.1:{port}/metrics")
    with pytest.raises(LoadError, match=r"a scrape failed: .*refused"), scrape.scraping(nowhere, 1):
        time.sleep(0.3)


@pytest.mark.server
@needs_h2load
def test_scraping_is_measured_beside_nobody_scraping(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[scrape.Collected] = []
    honest = scrape.measure

    def measure_once(*given: Any) -> scrape.Collected:
        measured[:] = measured or [honest(*given)]
        return measured[0]

    monkeypatch.setattr(scrape, "measure", measure_once)
    out = tmp_path / "scrape.csv"
    arguments = ["--configs=tiny", "--rounds=1", "--seconds=0.2", "--intervals", "0.1", SETTINGS, f"--out={out}"]
    assert scrape.main([*arguments, "--most=100"]) == 0
    nobody, scraped, usual = read(out)
    assert [row["interval_s"] for row in (nobody, scraped, usual)] == ["", "0.1", "15"]
    for row in (nobody, scraped):
        assert float(row["requests_per_second"]) > 0 and float(row["ratio"]) > 0
    assert float(scraped["scrape_cpu_ms"]) > 0
    assert int(scraped["page_bytes"]) > int(scraped["sent_bytes"]) > 0
    assert usual["requests_per_second"] == "" and float(usual["cpu_share"]) < float(scraped["cpu_share"])
    assert "expected at most 10000 %" in capsys.readouterr().out
    assert scrape.main([*arguments, "--most=-100"]) == 1


@pytest.mark.server
def test_a_start_is_measured_with_the_plan_that_the_first_one_chose(tiny: None, tmp_path: Path) -> None:
    out = tmp_path / "start.csv"
    assert start.main(["--configs=tiny", "--rounds=1", "--settings=--max-batch 4", f"--out={out}"]) == 0
    tuned, fixed = read(out)
    assert (tuned["plan"], tuned["flags"], fixed["plan"]) == ("by measurement", "", "by settings")
    assert re.fullmatch(r"--threads=\d+ --runtimes=\d+ --max-batch=4", fixed["flags"])
    for row in (tuned, fixed):
        parts = [float(row[name]) for name in ("imports_s", "models_s", "ports_s")]
        assert sum(parts) == pytest.approx(float(row["ready_s"]), rel=0.01, abs=0.02)  # rounded to 3 digits
        assert row["ready_least_s"] == row["ready_s"] == row["ready_most_s"]
        assert float(row["cpu_s"]) > 0


@pytest.mark.server
def test_a_server_that_does_not_start_ends_the_measurement(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert start.main(["--configs=tiny", "--rounds=1", "--settings=--model none"]) == 1
    error = capsys.readouterr().err
    assert "tiny: the server did not start: " in error
    assert "cannot start: " in error


def test_a_gain_is_above_one_where_a_trick_helps() -> None:
    kept, off = Figures(1000, 0.0005, 0.0001), Figures(800, 0.0008, 0.0002)
    gain = Gain.of(kept, off)
    assert (gain.throughput, gain.cpu, gain.loop) == pytest.approx((1.25, 1.6, 1.2))
    assert Gain.of(kept, kept) == Gain(1, 1, 1)


@pytest.mark.server
@needs_h2load
def test_each_trick_is_measured_with_it_and_without(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tricks.csv"
    arguments = ["--config=tiny", "--rounds=1", "--seconds=0.1", "--settings=--threads 1 --max-batch 8"]
    chosen = ["--tricks", "headers remembered", "--loads", "16 in flight", REFUSALS, OVERLOAD]
    assert tricks.main([*arguments, *chosen, f"--out={out}"]) == 0
    rows = read(out)
    assert [row["load"] for row in rows] == ["16 in flight", REFUSALS, OVERLOAD]
    assert {row["trick"] for row in rows} == {"headers remembered"}
    for row in rows:
        assert float(row["per_second"]) > 0
        assert 0 < float(row["loop_us"]) <= float(row["cpu_us"])
        for name in ("throughput", "cpu", "loop"):
            assert 0 < float(row[f"{name}_low"]) <= float(row[name]) <= float(row[f"{name}_high"])
        assert row["commit"] and row["device"]
    assert "headers remembered" in capsys.readouterr().out


@pytest.mark.server
def test_a_server_without_any_trick_answers_as_it_does_with_them(running: Running, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    request = pb.ClassifyRequest(images=[pb.Image(pixels=random.bytes(784)) for _ in range(2)])
    expected = running.stub.Classify(request)
    flags = ["--threads=1", "--max-batch=8", "--runtimes=1"]
    program = ("benchmarks.without", ",".join(TRICKS))
    with (
        server.serve(
            server.repository(server.EMBEDDED, "fp32", tmp_path), "fp32", flags, tmp_path, program=program
        ) as served,
        grpc.insecure_channel(served.targets["tcp"]) as channel,
    ):
        stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
        streamed = next(stub.ClassifyStream(iter([pb.ClassifyStreamRequest(request=request)])))
        for response in (stub.Classify(request), streamed.response):
            for one, other in zip(response.results, expected.results, strict=True):
                assert one.label == other.label
                for capsule, its in zip(one.capsules, other.capsules, strict=True):
                    np.testing.assert_allclose(list(capsule.pose), list(its.pose), rtol=1e-3, atol=1e-5)
        assert served.page().total("grpc_server_handled_total", grpc_method="Classify", grpc_code="OK") == 1


def test_every_trick_names_loads_that_there_are() -> None:
    assert all(trick.loads and set(trick.loads) <= set(LOADS) for trick in TRICKS.values())


@pytest.mark.server
@needs_h2load
def test_the_servers_of_two_trees_are_measured_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, tree = tmp_path / "beside.csv", str(Path(beside.__file__).parent.parent)
    arguments = [tree, tree, "--rounds=2", "--seconds=0.1", "--settings=--threads 1 --runtimes 1 --max-batch 8"]
    assert beside.main([*arguments, f"--out={out}"]) == 0
    base, other = read(out)
    assert (base["throughput"], base["cpu"]) == ("1.000", "1.000")
    for name in ("throughput", "cpu"):
        assert 0 < float(other[f"{name}_low"]) <= float(other[name]) <= float(other[f"{name}_high"])
    assert float(other["per_second"]) > 0 and float(other["cpu_us"]) > 0
    assert capsys.readouterr().out.count(tree) == 2


@needs_h2load
def test_a_model_that_is_not_there_ends_the_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    assert beside.main([".", "--model=none"]) == 1
    assert "no model 'none'" in capsys.readouterr().err


@pytest.mark.parametrize("main", [serving.main, overload.main, scrape.main, tricks.main, lambda _: beside.main(["."])])
def test_without_h2load_it_is_told_how_to_get_it(
    main: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert callable(main) and main([]) == 2
    assert "apt install nghttp2-client" in capsys.readouterr().err


def test_the_plan_of_a_server_is_that_of_the_classifying_graph() -> None:
    names = {"capsnet_runtimes": 2, "capsnet_threads": 1, "capsnet_max_batch_images": 16}
    graphs = ("classify", "explain", "decoder")
    samples = tuple((name, {"graph": graph}, float(value)) for name, value in names.items() for graph in graphs)
    assert serving.setup(Page(samples), []) == serving.Setup(2, 1, 16)
