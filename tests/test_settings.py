"""Settings: one definition for flag, environment variable, default and help."""

from dataclasses import fields

import pytest

from serving.settings import Settings, read


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
        (["--threads", "1000000"], "threads: 1000000; expected 256 or less"),
        (["--device", "tpu"], "device: 'tpu'; expected one of auto, cpu, cuda"),
        (["--max-queue", "10"], "max_images_per_request: 1024; the queue holds only 10"),
        (["--drain-delay", "nan"], "drain_delay: nan; expected 0 or more"),
    ],
)
def test_wrong_settings_are_refused_by_name(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        read(arguments, {})
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
