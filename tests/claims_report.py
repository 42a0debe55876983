"""The report on the claims in the documentation."""

import json

from tests.conftest import ROOT
from training.claims.evidence import Evidence
from training.claims.report import JSON_FILE

DOCS = ROOT / "docs" / "claims"


def words_of(row: Evidence | int) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """Return the names of comparisons with their units, of figures and of pictures.

    row: its evidence, or its number for what the report in the documentation has.
    """
    if isinstance(row, Evidence):
        return [(one.name, one.unit) for one in row.comparisons], list(row.figures), list(row.pictures)
    told = json.loads((DOCS / JSON_FILE).read_text())["rows"][str(row)]
    return [(one["name"], one["unit"]) for one in told["comparisons"]], list(told["figures"]), told["pictures"]
