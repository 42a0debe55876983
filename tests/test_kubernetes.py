"""Tests of the manifests: valid by Kubernetes's schemas, and consistent with each other and with the code."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]

from protos.capsnet.v1 import capsnet_pb2
from protos.inference import inference_pb2
from serving.metrics.registry import Metrics
from serving.settings import ENVIRONMENT_PREFIX, Settings, read
from tests.conftest import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"
OLDEST = "1.27"
CUSTOM = {"ServiceMonitor", "ServingRuntime", "InferenceService"}
BUILDS = ("base", "overlays/example", "kserve")

Document = dict[str, Any]


def _documents(path: Path) -> list[Document]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def _kustomizations() -> list[Path]:
    return sorted(FOLDER.glob("**/kustomization.yaml"))


def _listed(kustomization: Path) -> Iterator[Path]:
    """Return the files and folders of which a kustomization is made."""
    (content,) = _documents(kustomization)
    names = [*content.get("resources", []), *content.get("components", [])]
    names += [patch["path"] for patch in content.get("patches", [])]
    for name in names:
        yield (kustomization.parent / name).resolve()


def _resources() -> list[Document]:
    """Return all resources that are not patches, as they are in the files."""
    return [
        document
        for kustomization in _kustomizations()
        for name in _documents(kustomization)[0]["resources"]
        if (path := kustomization.parent / name).is_file()
        for document in _documents(path)
    ]


def _one(kind: str, name: str = "capsnet") -> Document:
    (found,) = [one for one in _resources() if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def _build(folder: str) -> list[Document]:
    command = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    result = subprocess.run([*command, str(FOLDER / folder)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return list(yaml.safe_load_all(result.stdout))


needs_kustomize = pytest.mark.skipif(
    not (shutil.which("kustomize") or shutil.which("kubectl")), reason="kustomize is not installed"
)


def _pod() -> Document:
    template: Document = _one("Deployment")["spec"]["template"]
    return template


def _server() -> Document:
    (container,) = _pod()["spec"]["containers"]
    assert container["name"] == "server"
    return dict(container)


def _runtime_container() -> Document:
    (container,) = _one("ServingRuntime")["spec"]["containers"]
    return dict(container)


def _settings(container: Document) -> Settings:
    """Return the settings that the server would read from a container."""
    environment = {variable["name"]: variable["value"] for variable in container.get("env", [])}
    known = {ENVIRONMENT_PREFIX + name.upper() for name in Settings.__dataclass_fields__}
    assert {name for name in environment if name.startswith(ENVIRONMENT_PREFIX)} <= known
    return read(container.get("args", []), environment)


def test_every_file_that_is_listed_exists_and_every_file_is_listed() -> None:
    listed = {path for kustomization in _kustomizations() for path in _listed(kustomization)}
    assert [str(path) for path in listed if not path.exists()] == []
    manifests = set(FOLDER.glob("**/*.yaml")) - set(_kustomizations())
    unlisted = {path.name for path in manifests if path.resolve() not in listed}
    assert unlisted == {"adapter-rules.yaml"}  # not Kubernetes's but the adapter's


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_every_resource_is_valid_by_the_schemas_of_kubernetes(version: str) -> None:
    kinds = set()
    for resource in _resources():
        kinds.add(resource["kind"])
        if resource["kind"] not in CUSTOM:
            kubernetes_validate.validate(resource, version, strict=True)
    assert kinds > CUSTOM


@needs_kustomize
@pytest.mark.parametrize("folder", BUILDS)
def test_the_output_of_kustomize_is_valid_too(folder: str) -> None:
    built = _build(folder)
    for resource in built:
        if resource["kind"] not in CUSTOM:
            kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)
    names = [(resource["kind"], resource["metadata"]["name"]) for resource in built]
    assert len(set(names)) == len(names)


@needs_kustomize
def test_the_example_has_both_components_and_keeps_the_settings_of_the_base() -> None:
    built = {(one["kind"], one["metadata"]["name"]): one for one in _build("overlays/example")}
    (server,) = built["Deployment", "capsnet"]["spec"]["template"]["spec"]["containers"]
    base, example = _settings(_server()), _settings(server)
    assert (example.drain_delay, example.drain_seconds) == (base.drain_delay, base.drain_seconds)
    assert example.precision == "int8"
    mounted = {mount["mountPath"]: mount["name"] for mount in server["volumeMounts"]}
    assert mounted.keys() == {"/tmp", example.models}
    volumes = {one["name"]: one for one in built["Deployment", "capsnet"]["spec"]["template"]["spec"]["volumes"]}
    claim = volumes[mounted[example.models]]["persistentVolumeClaim"]["claimName"]
    assert ("PersistentVolumeClaim", claim) in built
    metrics = built["HorizontalPodAutoscaler", "capsnet"]["spec"]["metrics"]
    assert [metric["type"] for metric in metrics] == ["Resource", "Pods"]
    assert {one["metadata"]["namespace"] for one in built.values() if one["kind"] != "Namespace"} == {"capsnet"}


def test_every_selector_matches_the_pods() -> None:
    labels = _pod()["metadata"]["labels"].items()
    spec = _pod()["spec"]
    selectors = [_one("Service")["spec"]["selector"], _one("Service", "capsnet-metrics")["spec"]["selector"]]
    selectors += [_one(kind)["spec"]["selector"]["matchLabels"] for kind in ("Deployment", "PodDisruptionBudget")]
    selectors += [_one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"]]
    selectors += [constraint["labelSelector"]["matchLabels"] for constraint in spec["topologySpreadConstraints"]]
    assert all(selector and selector.items() <= labels for selector in selectors), selectors
    target = _one("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    deployment = _one("Deployment")
    assert target == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"]


def test_prometheus_finds_the_metrics_service_alone_and_calls_its_job_as_the_rules_do() -> None:
    monitor = _one("ServiceMonitor")["spec"]
    matching = [
        one
        for one in _resources()
        if one["kind"] == "Service" and monitor["selector"]["matchLabels"].items() <= one["metadata"]["labels"].items()
    ]
    assert [one["metadata"]["name"] for one in matching] == ["capsnet-metrics"]
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in [port["name"] for port in matching[0]["spec"]["ports"]]
    (scraping,) = _documents(ROOT / "deploy" / "prometheus" / "prometheus.yml")
    assert matching[0]["metadata"]["labels"][monitor["jobLabel"]] in [
        job["job_name"] for job in scraping["scrape_configs"]
    ]


def test_ports_are_those_that_the_server_opens() -> None:
    server, settings = _server(), _settings(_server())
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert ports == {"grpc": settings.port, "http": settings.http_port, "metrics": settings.metrics_port}
    for name in ("capsnet", "capsnet-metrics"):
        for port in _one("Service", name)["spec"]["ports"]:
            assert port["port"] == ports[port["targetPort"]]
    policy = _one("NetworkPolicy")["spec"]
    assert [port["port"] for rule in policy["ingress"] for port in rule["ports"]] == ["grpc", "http", "metrics"]
    runtime, settings = _runtime_container(), _settings(_runtime_container())
    assert [(port["name"], port["containerPort"]) for port in runtime["ports"]] == [("h2c", settings.port)]
    assert _one("ServingRuntime")["spec"]["annotations"]["prometheus.kserve.io/port"] == str(settings.metrics_port)
    for container in (server, runtime):
        for probe in ("startupProbe", "readinessProbe"):
            assert container[probe]["grpc"] == {"port": settings.port}, probe
    assert server["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "metrics"}
    assert runtime["livenessProbe"]["grpc"] == {"port": settings.port}


def test_no_service_can_set_a_setting() -> None:
    """Kubernetes sets NAME_PORT for each Service of a namespace, unless the pod turns that off."""
    for spec in (_pod()["spec"], _one("InferenceService")["spec"]["predictor"]):
        assert spec["enableServiceLinks"] is False


def test_a_pod_gets_longer_to_stop_than_the_server_takes() -> None:
    predictor = _one("InferenceService")["spec"]["predictor"]
    for spec, container in ((_pod()["spec"], _server()), (predictor, _runtime_container())):
        settings = _settings(container)
        assert settings.drain_delay >= 5
        assert spec["terminationGracePeriodSeconds"] >= settings.drain_delay + settings.drain_seconds + 5


def test_the_server_may_do_nothing_but_serve() -> None:
    user = int(re.findall(r"^USER (\d+):\d+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[-1])
    for pod, container in ((_pod()["spec"]["securityContext"], _server()), ({}, _runtime_container())):
        context = pod | container["securityContext"]
        assert context == {
            "runAsNonRoot": True,
            "runAsUser": user,
            "runAsGroup": user,
            "seccompProfile": {"type": "RuntimeDefault"},
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert resources["limits"]["cpu"].isdecimal(), "whole cores, which the server can count"
        assert container["image"] == "capsnet-serving"
    assert _pod()["spec"]["automountServiceAccountToken"] is False


def test_the_autoscaler_uses_a_metric_that_the_adapter_makes_of_the_servers() -> None:
    (patch,) = yaml.safe_load((FOLDER / "monitoring" / "scale-on-queue.yaml").read_text())
    (rules,) = _documents(FOLDER / "monitoring" / "adapter-rules.yaml")
    (rule,) = rules["rules"]
    assert patch["value"]["pods"]["metric"]["name"] == rule["name"]["as"]
    known = {
        family.name + ending for family in Metrics().registry.collect() for ending in ("", "_total", "_sum", "_count")
    }
    used = set(re.findall(r"\b(?:capsnet|grpc|nv)_\w+", rule["seriesQuery"] + rule["metricsQuery"]))
    assert used
    assert used <= known


def test_kserve_finds_the_runtime_of_each_service_and_one_folder_of_models_serves_both() -> None:
    runtime = _one("ServingRuntime")
    ours, triton = _one("InferenceService"), _one("InferenceService", "capsnet-triton")
    model = ours["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    formats = [{key: one[key] for key in ("name", "version")} for one in runtime["spec"]["supportedModelFormats"]]
    assert model["modelFormat"] in formats
    assert _runtime_container()["name"] == "kserve-container"
    assert _settings(_runtime_container()).models == "/mnt/models"
    other = triton["spec"]["predictor"]["model"]
    assert (other["runtime"], other["protocolVersion"]) == ("kserve-tritonserver", model["protocolVersion"])
    assert [(port["name"], port["containerPort"]) for port in other["ports"]] == [("h2c", 9000)]
    assert model["storageUri"] == other["storageUri"]
    assert _one("PersistentVolumeClaim", model["storageUri"].removeprefix("pvc://"))


def test_the_clients_service_config_names_methods_and_codes_that_there_are() -> None:
    config = json.loads((FOLDER / "client-service-config.json").read_text())
    services = {
        service.full_name: {method.name for method in service.methods}
        for file in (capsnet_pb2.DESCRIPTOR, inference_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
    }
    (methods,) = config["methodConfig"]
    for name in methods["name"]:
        assert {name["method"]} <= services[name["service"]] if "method" in name else name["service"] in services
    assert set(methods["retryPolicy"]["retryableStatusCodes"]) <= {code.name for code in grpc.StatusCode}


def test_the_documents_command_makes_a_prometheus_rule_of_the_rules() -> None:
    (command,) = re.findall(
        r"^(\{ printf .*?; \}) \| kubectl", (FOLDER / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    rule = yaml.safe_load(result.stdout)
    assert (rule["kind"], rule["metadata"]["name"]) == ("PrometheusRule", "capsnet")
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yml").read_text())
    assert all(group["rules"] for group in rule["spec"]["groups"])
