"""Tests of rules, alerts and dashboard, with Prometheus's own tools and a Prometheus that scrapes a real server."""

import itertools
import json
import math
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.capsnet.v1 import capsnet_pb2 as pb
from protos.capsnet.v1.capsnet_pb2_grpc import CapsNetServiceStub
from serving.metrics.registry import Metrics
from tests.conftest import DATA, ROOT
from tests.test_lifecycle import server_process

PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = (PROMETHEUS / "rules.yml").read_text()
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "capsnet.json").read_text())
DIGIT = pb.Image(encoded=(DATA / "seven.png").read_bytes())
#: The values that Grafana puts in their place.
VARIABLES = {
    "$job": "capsnet",
    "$instance": ".+",
    "$model": ".+",
    "$version": ".+",
    "$graph": ".+",
    "$__rate_interval": "10s",
}
PATIENCE = 30.0

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")), reason="Prometheus is not installed"
)


@dataclass(frozen=True)
class Watched:
    """A server process, and the Prometheus at ``url`` that scrapes it."""

    server: subprocess.Popen[str]
    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of Prometheus's API at a path, or the error text of a wrong query."""
        try:
            with urllib.request.urlopen(
                f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=10
            ) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            with error:
                pytest.fail(f"{parameters}: {error.read().decode()}")

    def values(self, query: str) -> list[float]:
        """Return the values of a query's series that are numbers."""
        found = [float(series["value"][1]) for series in self.get("query", query=query)["result"]]
        return [value for value in found if not math.isnan(value)]

    def wait_for_values(self, queries: Iterable[str]) -> None:
        """Wait until each query has a number. Fail with the queries that have none."""
        missing, end = list(queries), time.monotonic() + PATIENCE
        while missing := [query for query in missing if not self.values(query)]:
            assert time.monotonic() < end, "no data: " + "\n".join(missing)
            time.sleep(0.5)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A server under load, and a Prometheus with the shipped configuration except for addresses and intervals.

    The last test that uses them kills the server.
    """
    folder = tmp_path_factory.mktemp("prometheus")
    with socket.create_server(("127.0.0.1", 0)) as free:
        own = f"127.0.0.1:{free.getsockname()[1]}"
    plan = ("--threads", "1", "--runtimes", "1", "--max-batch", "8")
    with server_process(*plan, "--http-port", "0") as (server, address, lines):
        page = re.search(r"metrics on http://([^/]+)/metrics", lines[-1])
        web = re.search(r"HTTP on (http://\S+)", "".join(lines))
        assert page and web
        changes = {"capsnet:8002": page[1], "localhost:9090": own, "5s": "1s", "4s": "1s", "15s": "1s"}
        _copy("prometheus.yml", folder, changes)
        _copy("rules.yml", folder, {"interval: 1m": "interval: 1s"})
        command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=error"]
        process = subprocess.Popen([*command, f"--web.listen-address={own}"], cwd=folder)
        try:
            found = Watched(server, f"http://{own}")
            _wait_until_ready(found.url)
            with _load(address, web[1]):
                found.wait_for_values(['up{job="capsnet"} == 1'])
                yield found
        finally:
            process.terminate()
            process.wait()


def _copy(name: str, folder: Path, changes: dict[str, str]) -> None:
    """Return a copy of a configuration file with whole words replaced."""
    text = (PROMETHEUS / name).read_text()
    for old in changes:
        assert old in text
    words = "|".join(rf"(?<!\w){re.escape(old)}(?!\w)" for old in changes)
    (folder / name).write_text(re.sub(words, lambda match: changes[match[0]], text))


def _wait_until_ready(url: str) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            urllib.request.urlopen(f"{url}/-/ready", timeout=5).close()
            return
        except urllib.error.HTTPError as error:  # it listens before it can answer
            error.close()
        except OSError:
            pass
        assert time.monotonic() < end, "Prometheus did not start"
        time.sleep(0.1)


@contextmanager
def _load(address: str, web: str) -> Iterator[None]:
    """Send right and wrong requests, alone, in streams and over HTTP, until the process or the server ends."""
    stop = threading.Event()

    def send() -> None:
        right, wrong = pb.ClassifyRequest(images=[DIGIT] * 3), pb.ClassifyRequest()
        stream = [pb.ClassifyStreamRequest(request=request) for request in (right, wrong, right)]
        with grpc.insecure_channel(address) as channel, suppress(grpc.RpcError, OSError):
            stub = CapsNetServiceStub(channel)  # type: ignore[no-untyped-call]
            while not stop.wait(0.05):
                stub.Classify(right, timeout=10)
                list(stub.ClassifyStream(iter(stream), timeout=10))
                with suppress(grpc.RpcError):
                    stub.Classify(wrong, timeout=10)
                urllib.request.urlopen(f"{web}/v1/model", timeout=10).close()

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _targets() -> dict[str, str]:
    """Return the queries of the dashboard's panels with their variables set, by panel title and letter."""
    return {
        f"{panel['title']} {target['refId']}": _filled(target["expr"])
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    }


def _filled(query: str) -> str:
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    assert "$" not in query
    return query


def _promtool(*arguments: str) -> str:
    environment = os.environ | {"GOGC": "400"}  # it collects garbage less often, which takes a fifth of its time
    result = subprocess.run(
        ["promtool", *arguments], cwd=PROMETHEUS, env=environment, capture_output=True, text=True, check=False
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    return output


@needs_prometheus
def test_promtool_finds_nothing_wrong_with_configuration_and_rules() -> None:
    output = _promtool("check", "config", "--lint=all", "--lint-fatal", "prometheus.yml")
    assert f"{RULES.count('- alert:') + RULES.count('- record:')} rules found" in output


@needs_prometheus
def test_the_rules_pass_their_own_tests_and_each_alert_has_one() -> None:
    files = ("rules_test.yml", "rules_hours_test.yml")
    _promtool("test", "rules", *files)
    tests = "".join((PROMETHEUS / file).read_text() for file in files)
    assert [name for name in re.findall(r"alert: (\w+)", RULES) if f'alertname="{name}"' not in tests] == []


@needs_prometheus
def test_every_panel_has_data_of_models_of_several_versions_and_graphs(tmp_path: Path) -> None:
    """Check all queries with two graphs: a query that joins series may be right for one graph and wrong for two."""
    expressions = [query.replace("[10s]", "[5m]") for query in _targets().values()]
    panels = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(expressions)]
    rules, tests = tmp_path / "panels.yml", tmp_path / "tests.yml"
    rules.write_text(json.dumps({"groups": [{"name": "panels", "rules": panels}]}))
    test = {
        "interval": "1m",
        "input_series": [{"series": series, "values": "1+60x30"} for series in _series_of_two_graphs()],
        # With an empty answer promtool also names the rule that could not be evaluated.
        "promql_expr_test": [
            {"expr": f"absent({panel['record']})", "eval_time": "20m", "exp_samples": []} for panel in panels
        ],
    }
    files = [str(PROMETHEUS / "rules.yml"), str(rules)]
    tests.write_text(json.dumps({"rule_files": files, "evaluation_interval": "1m", "tests": [test]}))
    _promtool("test", "rules", str(tests))


def _series_of_two_graphs() -> Iterator[str]:
    """Return series of two servers that serve two versions of a model, each with two graphs."""
    values: dict[str, tuple[str, ...]] = {
        "version": ("1", "2"), "graph": ("classify", "explain"), "grpc_code": ("OK", "INTERNAL"),
        "reason": ("unauthenticated", "queue_full"), "grpc_type": ("unary",), "grpc_method": ("Classify", "GetModel"),
        "port": ("grpc", "http"),
    }  # fmt: skip
    for metric in Metrics().declarations:
        buckets = [*map(str, map(float, metric.buckets or (0, 1, 2))), "+Inf"]
        for sample in metric.samples:
            choices = {name: values.get(name, ("x",)) for name in metric.labels}
            yield from _series(sample, choices | ({"le": buckets} if sample.endswith("_bucket") else {}))
    others = set(re.findall(r"\b(?:process|python)_\w+", " ".join(_queries())))
    for name in ("up", "scrape_duration_seconds", *sorted(others)):
        yield from _series(name, {"generation": ("0",)} if name.startswith("python") else {})


def _series(name: str, labels: Mapping[str, Iterable[str]]) -> Iterator[str]:
    choices = {"job": ("capsnet",), "instance": ("a", "b"), **labels}
    for values in itertools.product(*choices.values()):
        selected = ", ".join(f'{label}="{value}"' for label, value in zip(choices, values, strict=True))
        yield f"{name}{{{selected}}}"


@needs_prometheus
def test_every_rule_and_panel_has_data_of_a_server_under_load(watched: Watched) -> None:
    queries = _targets()
    for annotation in DASHBOARD["annotations"]["list"]:
        if "expr" in annotation:
            watched.values(_filled(annotation["expr"]))
    rules = [rule for group in watched.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == RULES.count("- alert:") + RULES.count("- record:")
    records = {rule["name"] for rule in rules if rule["type"] == "recording"}
    # A fallback for missing errors would hide a wrong query, so the load makes real errors.
    errors = [query.split(" or on ()")[0] for query in queries.values() if " or on ()" in query]
    assert len(errors) == 4
    watched.wait_for_values([*queries.values(), *errors, *records])
    rules = [rule for group in watched.get("rules")["groups"] for rule in group["rules"]]
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []
    for rule in rules:
        watched.values(rule["query"])
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert match
            assert watched.get(f"label/{match[2]}/values", **{"match[]": _filled(match[1])})


@needs_prometheus
def test_killing_the_server_raises_its_alert_and_no_other_of_availability(watched: Watched) -> None:
    watched.server.kill()
    watched.wait_for_values(['up{job="capsnet"} == 0', 'ALERTS{alertname="CapsnetDown"}'])
    raised = {alert["labels"]["alertname"] for alert in watched.get("alerts")["alerts"]}
    assert raised.isdisjoint({"CapsnetAbsent", "CapsnetNotReady", "CapsnetRestarts", "CapsnetHang"})


def _queries() -> list[str]:
    """Return every query of the rules, panels, variables and annotations."""
    variables = [
        variable["query"]["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"
    ]
    annotations = [one["expr"] for one in DASHBOARD["annotations"]["list"] if "expr" in one]
    return [re.sub(r"(?m)^ *#.*", "", RULES), *_targets().values(), *map(_filled, (*variables, *annotations))]


def test_every_metric_of_rules_and_dashboard_is_declared() -> None:
    of_the_process = {sample.name for family in Metrics().registry.collect() for sample in family.samples}
    declared = {sample for metric in Metrics().declarations for sample in metric.samples}
    names = set(
        re.findall(r"(?<![\w:])(?:capsnet|grpc_server|nv_inference|process|python)_\w+(?![\w:])", "\n".join(_queries()))
    )
    assert len(names) > 40
    assert names - declared - of_the_process == set()
    recorded = set(re.findall(r"(?<![\w:])\w+:\w+(?::\w+)?", "\n".join(_targets().values())))
    assert recorded
    assert recorded - set(re.findall(r"record: (\S+)", RULES)) == set()


def _selectors(queries: Iterable[str]) -> list[tuple[str, set[str]]]:
    """Return, for each selector, the metric's sample name and the names of the labels in the selector."""
    declared = {sample for metric in Metrics().declarations for sample in metric.samples}
    return [
        (name, set(re.findall(r"(\w+)=", selector)) - {"job", "instance"})
        for name, selector in re.findall(r"(?<![\w:])(\w+)\{([^}]*)\}", "\n".join(queries))
        if name in declared
    ]


def test_rules_and_dashboard_select_by_labels_that_the_metrics_have() -> None:
    known = {sample: {*metric.labels, "le"} for metric in Metrics().declarations for sample in metric.samples}
    selectors = _selectors(_queries())
    assert len(selectors) > 100
    assert [(name, given - known[name]) for name, given in selectors if not given <= known[name]] == []
    # The selection at the top of the dashboard applies to every panel that shows models.
    for name, given in _selectors(_targets().values()):
        assert given >= known[name] & {"model", "version", "graph"} or name == "nv_inference_request_success", name


def test_every_alert_has_a_severity_a_runbook_and_the_runbook_a_section() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    alerts = re.split(r"- alert: ", RULES)[1:]
    for alert in alerts:
        name = alert.split("\n")[0]
        assert re.search(r"severity: (page|ticket)\n", alert)
        for annotation in ("summary", "description", "runbook"):
            assert f"\n          {annotation}: " in alert
        assert f"docs/operations.md#alert-{name.lower()}\n" in alert
        assert f"\n### Alert {name}\n" in page


def test_every_panel_has_a_description_and_a_unit() -> None:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert DASHBOARD["uid"] == "capsnet-serving"
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert [panel["title"] for panel in panels if not panel["description"].endswith(".")] == []
    plotted = [panel for panel in panels if panel["type"] in ("stat", "timeseries")]
    assert [panel["title"] for panel in plotted if not panel["fieldConfig"]["defaults"]["unit"]] == []
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24
