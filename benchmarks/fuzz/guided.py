"""``python -m benchmarks.fuzz.guided TARGET SECONDS FOLDER``: inputs that coverage guides, by atheris."""

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

_MAX_SECONDS, _MAX_MIB = 5, 2048  # of one input, and of the process
#: The packages whose branches guide the inputs.
_INSTRUMENTED = ["serving", "hpack", "json", "PIL"]


def main(name: str, seconds: str, folder: str) -> None:
    """Run atheris, which ends this process. folder: for new inputs, and for findings."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=_INSTRUMENTED):  # so they must not be imported before
        corpus = importlib.import_module("benchmarks.fuzz.corpus")
    target = corpus.TARGETS[name]
    with tempfile.TemporaryDirectory() as known:
        for number, data in enumerate(corpus.kept(target).values()):
            (Path(known) / str(number)).write_bytes(data)
        options = [
            f"-max_total_time={seconds}", f"-timeout={_MAX_SECONDS}", f"-rss_limit_mb={_MAX_MIB}",
            f"-max_len={corpus.MAX_BYTES}", f"-artifact_prefix={folder}/finding-", "-print_final_stats=1",
        ]  # fmt: skip
        atheris.Setup([sys.argv[0], *options, folder, known], target.run)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
