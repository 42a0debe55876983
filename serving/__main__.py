"""``python -m serving``: serve a model."""

import asyncio
import logging
import sys

from serving.artifact import ArtifactError
from serving.runtime import RuntimeSetupError
from serving.server import StartError, serve
from serving.settings import read


def main() -> int:
    settings = read(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(serve(settings))
    except (ArtifactError, RuntimeSetupError, StartError) as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
