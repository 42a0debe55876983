"""``python -m serving``: serve a model."""

import asyncio
import sys
import warnings

import uvloop

from serving.artifact import ArtifactError
from serving.files.images import limit_metadata
from serving.logs import set_up
from serving.runtime import RuntimeSetupError
from serving.server import StartError, serve
from serving.settings import read

# That the event loop, or a thread with a batch, waits for another's Python; a page of metrics takes 20 ms to write.
_SWITCH_SECONDS = 0.0005


def main() -> int:
    settings = read(sys.argv[1:])
    warnings.filterwarnings("ignore", module="PIL")  # about clients' files, in words that clients choose
    sys.setswitchinterval(_SWITCH_SECONDS)
    limit_metadata()
    set_up(settings.log_format, settings.log_level)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings))
    except (ArtifactError, RuntimeSetupError, StartError) as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
