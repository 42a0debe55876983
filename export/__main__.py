"""``python -m export``: turn a checkpoint into a verified ONNX artifact for the service."""

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status; Ctrl-C ends it in one line from the first import on."""
    try:
        from export.command import run_command

        return run_command(arguments)
    except ModuleNotFoundError as error:
        from serving.files.program import missing_package

        print(f"python -m export: {missing_package(error, 'cpu,export')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
