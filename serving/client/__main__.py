"""``python -m serving.client FILE...``: classify images with a running server, and look inside its answers."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; Ctrl-C ends it in one line from the first import on."""
    try:
        from serving.client.command import run_command

        return run_command(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
