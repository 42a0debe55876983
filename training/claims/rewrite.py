"""``python -m training.claims.rewrite FOLDER``: write the pages of a report again, with the words that rows have today.

Nothing is measured, and neither networks nor images are needed: the report's folder has the figures in report.json.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    command = argparse.ArgumentParser(prog="python -m training.claims.rewrite", description=__doc__, allow_abbrev=False)
    command.add_argument("folder", type=Path, metavar="FOLDER", help="the report's folder, such as docs/claims")
    folder: Path = command.parse_args(arguments).folder
    # The import of PyTorch takes seconds, so the arguments are checked before.
    from training.claims.report import read_report, write_pages
    from training.claims.rows import rows
    from training.claims.store import RunFolderError

    try:
        write_pages(read_report(rows(), folder), folder)
    except (OSError, RunFolderError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
