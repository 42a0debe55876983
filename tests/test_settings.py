"""Tests of the settings: one definition for flag, environment variable, default and help."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from serving.settings import DEFAULT_MODEL, ENVIRONMENT_PREFIX, Settings, embedded_models, read, service_links
from tests.conftest import ROOT


def test_a_flag_wins_over_its_variable_and_the_variable_over_the_default() -> None:
    environment = {"CAPSNET_MAX_BATCH": "8", "CAPSNET_PORT": "9000"}
    settings = read(["--max-batch", "16"], environment)
    assert (settings.max_batch, settings.port, settings.metrics_port) == (16, 9000, 8002)


def test_help_names_every_setting_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read(["--help"], {})
    text = capsys.readouterr().out
    for setting in fields(Settings):
        assert "--" + setting.name.replace("_", "-") in text
    assert "(default: 8001)" in text
    assert "CAPSNET_MAX_BATCH" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-batch", "-1"], "max_batch: -1; expected 0 or more"),
        (["--port", "70000"], "port: 70000; expected 65535 or less"),
        (["--http-port", "8002"], "http_port: 8002; another purpose has that port (--http-port chooses another)"),
        (["--admin-port", "8000"], "admin_port: 8000; another purpose has that port (--admin-port chooses another)"),
        (["--threads", "1000000"], "threads: 1000000; expected 256 or less"),
        (["--device", "tpu"], "device: 'tpu'; expected one of auto, cpu, cuda"),
        (["--max-queue", "10"], "max_images_per_request: 1024; the queue holds only 10"),
        (["--drain-delay", "nan"], "drain_delay: nan; expected 0 or more"),
        (["--trace-endpoint", "nonsense"], "trace_endpoint: 'nonsense'; expected a URL such as http://collector:4317"),
    ],
)
def test_wrong_settings_are_refused_by_name(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        read(arguments, {})
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("endpoint", "right"),
    [
        ("http://collector:4317", True),
        ("https://collector.example", True),
        ("http://[::1]:4317", True),
        ("http://10.0.0.1:4317/", True),
        ("collector:4317", False),
        ("http://", False),
        ("http://:4317", False),
        ("http://a b:1", False),
        ("ftp://collector", False),
        ("http://collector:70000", False),
        ("http://collector:0", False),
        ("http://collector:4317/v1/traces", False),
        ("http://user@collector", False),
        ("http://collector\n:1", False),
    ],
)
def test_a_collector_of_traces_is_named_by_its_url(endpoint: str, right: bool) -> None:
    if right:
        assert Settings(trace_endpoint=endpoint).trace_endpoint == endpoint
    else:
        with pytest.raises(ValueError, match=r"^trace_endpoint: .* expected a URL such as http://collector:4317$"):
            Settings(trace_endpoint=endpoint)


def test_a_variable_that_is_no_setting_is_refused_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    for name, nearest in [
        ("CAPSNET_PRECISON", "CAPSNET_PRECISION"),
        ("CAPSNET_MAXBATCH", "CAPSNET_MAX_BATCH"),
        ("CAPSNET_LOGLEVEL", "CAPSNET_LOG_LEVEL"),
    ]:
        with pytest.raises(SystemExit) as caught:
            read([], {name: "int8"})
        assert caught.value.code == 2
        assert f"environment variable {name} is no setting; did you mean {nearest}?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        read([], {"CAPSNET_XYZZY": ""})
    assert "CAPSNET_XYZZY is no setting; --help lists the settings" in capsys.readouterr().err


def test_a_variable_in_lower_case_is_refused_with_the_setting_in_upper_case(capsys: pytest.CaptureFixture[str]) -> None:
    for variable in ("capsnet_port", "Capsnet_Port"):
        with pytest.raises(SystemExit, match="2"):
            read([], {variable: "9001"})
        error = f"environment variable {variable} is no setting; did you mean CAPSNET_PORT?"
        assert error in capsys.readouterr().err


def test_a_mistake_is_told_without_all_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        read(["--prot", "9001"], {})
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_flag_that_is_not_known_is_refused_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read(["--precison=int8"], {})
    assert caught.value.code == 2
    assert "unrecognized arguments: --precison=int8; did you mean --precision?" in capsys.readouterr().err


def test_choices_are_taken_in_any_case() -> None:
    assert read([], {"CAPSNET_LOG_LEVEL": "INFO"}).log_level == "info"
    assert read(["--log-level", "Warning", "--precision", "INT8"], {}).precision == "int8"


def test_an_empty_variable_is_as_none() -> None:
    assert read([], {"CAPSNET_PRECISION": "", "CAPSNET_MAX_BATCH": ""}) == Settings()


def test_blanks_around_a_variable_do_not_count() -> None:
    environment = {
        "CAPSNET_PRECISION": "int8\r",
        "CAPSNET_MAX_BATCH": " 16 ",
        "CAPSNET_INSECURE": "1 ",
        "CAPSNET_MODEL": " ",
    }
    assert read([], environment) == Settings(precision="int8", max_batch=16, insecure=True)


def test_a_file_has_settings_that_variables_and_flags_override(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(
        'max_batch = 16\nport = 9000\nhttp_port = 9001\nlog_level = "INFO"\ndrain_delay = 2\ninsecure = true\n'
    )
    settings = read(["--settings-file", str(file), "--port", "9002"], {"CAPSNET_HTTP_PORT": "9003"})
    assert (settings.max_batch, settings.port, settings.http_port) == (16, 9002, 9003)
    assert (settings.log_level, settings.drain_delay, settings.insecure) == ("info", 2, True)
    assert read([], {"CAPSNET_SETTINGS_FILE": str(file)}).max_batch == 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_btach = 1", "settings_file: max_btach is no setting; did you mean max_batch?"),
        ("max_batch = true", "settings_file: max_batch: True; expected a whole number"),
        ("max_batch = 1.5", "settings_file: max_batch: 1.5; expected a whole number"),
        ("insecure = 1", "settings_file: insecure: 1; expected true or false"),
        ("drain_delay = 'long'", "settings_file: drain_delay: 'long'; expected a number"),
        ("[server]\nport = 1", "settings_file: server is no setting"),
        ("settings_file = 'x'", "settings_file: settings_file is no setting"),
        ("max_batch = -1", "max_batch: -1; expected 0 or more"),
        ("max_batch", "is not TOML: "),
        ("\xff", "is not TOML: "),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_file_of_settings_is_refused_by_name(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.toml"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(SystemExit):
        read(["--settings-file", str(file)], {})
    assert message in capsys.readouterr().err


def test_variables_that_kubernetes_sets_for_services_are_ignored() -> None:
    links = {
        "CAPSNET_PORT": "tcp://10.96.12.7:8001",
        "CAPSNET_METRICS_PORT": "tcp://10.96.12.8:8002",
        "CAPSNET_SERVICE_HOST": "10.96.12.7",
        "CAPSNET_SERVICE_PORT": "8001",
        "CAPSNET_SERVICE_PORT_GRPC": "8001",
        "CAPSNET_PORT_8001_TCP": "tcp://10.96.12.7:8001",
        "CAPSNET_PORT_8001_TCP_PROTO": "tcp",
        "CAPSNET_PORT_8001_TCP_PORT": "8001",
        "CAPSNET_PORT_8001_TCP_ADDR": "10.96.12.7",
        "CAPSNET_METRICS_SERVICE_HOST": "10.96.12.8",
        "CAPSNET_METRICS_PORT_8002_TCP": "tcp://10.96.12.8:8002",
    }
    own = {"CAPSNET_ADMIN_PORT": "9001", "PATH": "/bin", "OTHER_PORT": "tcp://10.96.12.9:80"}
    assert service_links(links | own) == sorted(links)
    assert read([], links | own) == Settings(admin_port=9001)
    assert read(["--port", "22011"], links).port == 22011
    assert service_links({"CAPSNET_PORT": "9000"}) == []


def test_variables_of_the_compose_file_do_not_keep_a_server_from_starting() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    variables = set(re.findall(rf"\$\{{({ENVIRONMENT_PREFIX}\w+)", text))
    assert {"CAPSNET_TRAINING_EPOCHS", "CAPSNET_CPUS"} <= variables
    read([], dict.fromkeys(variables, ""))


def test_every_setting_can_be_given_to_compose_but_those_that_the_file_decides() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    environment = text.split("environment: &environment\n")[1].split("\n  # ")[0]
    passed_on = set(re.findall(r"^    (\w+):", environment, re.MULTILINE))
    decided = {"HOST", "PORT", "METRICS_PORT", "HTTP_PORT", "ADMIN_PORT", "MODELS", "UNIX_SOCKET"}
    decided |= {"DEVICE", "ENGINE_CACHE"}
    expected = {f"{ENVIRONMENT_PREFIX}{setting.name.upper()}" for setting in fields(Settings)}
    assert passed_on == expected - {ENVIRONMENT_PREFIX + name for name in decided}


def test_without_a_choice_the_default_model_is_served_alone() -> None:
    assert Settings().only_model == DEFAULT_MODEL
    assert Settings(model="capsnet-multimnist").only_model == "capsnet-multimnist"
    assert Settings(models="folder").only_model == ""
    assert Settings(models="folder", model="one").only_model == "one"
    assert (embedded_models() / DEFAULT_MODEL).is_dir()
