"""``python -m training``: train a capsule network, test it once, and write its checkpoint and its report."""

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status; Ctrl-C ends it in one line from the first import on."""
    try:
        from training.command import run_command

        return run_command(arguments)
    except ModuleNotFoundError as error:
        from serving.files.program import missing_package

        print(f"python -m training: {missing_package(error, 'train')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
