"""``python -m serving``: serve a model."""

import asyncio
import logging
import sys
import warnings

from serving.artifact import ArtifactError
from serving.images import limit_metadata
from serving.runtime import RuntimeSetupError
from serving.server import StartError, serve
from serving.settings import read


def main() -> int:
    settings = read(sys.argv[1:])
    warnings.filterwarnings("ignore", module="PIL")  # about clients' files, in words that clients choose
    limit_metadata()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(serve(settings))
    except (ArtifactError, RuntimeSetupError, StartError) as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
