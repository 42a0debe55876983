"""Results of the command line: as text for people."""

import numpy as np

from serving.client.explanations import ClassExplanation, Explanation
from serving.client.results import Classification, PrimaryCapsules, Verdict

_BAR_CHARACTERS = 30  # the bar of a length of 1
_POSE_NUMBERS_IN_LINE = 8
_SHOWN_CAPSULES = 3


def shown(name: str) -> str:
    """Return a file's name without characters that a terminal obeys or cannot show, such as line ends: escaped."""
    if name.isprintable():
        return name
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in name)


def classification_lines(name: str, result: Classification, bar: str) -> list[str]:
    """Return the lines that show a classification. bar: the character of the bars."""
    width = max(len(label) for label in result.labels)
    lines = [f"{name}: {result.label}"]
    if result.verdict is not Verdict.UNKNOWN:
        several = f" ({', '.join(result.present)})" if result.verdict is Verdict.SEVERAL else ""
        lines.append(f"  verdict: {result.verdict}{several}, confidence {result.confidence:.3f}")
    if result.reconstruction_error is not None:
        lines.append(f"  reconstruction error: {result.reconstruction_error:.4f}")
    lines.append("  lengths:")
    for label, length in zip(result.labels, result.probabilities.tolist(), strict=True):
        characters = round(_BAR_CHARACTERS * min(1.0, max(0.0, length)))
        lines.append(f"    {label:>{width}} {bar * characters:<{_BAR_CHARACTERS}} {length:.3f}")
    pose = [f"{value:+.2f}" for value in result.pose.tolist()]
    rows = [pose[start : start + _POSE_NUMBERS_IN_LINE] for start in range(0, len(pose), _POSE_NUMBERS_IN_LINE)]
    return [*lines, f"  pose of {result.label}:", *(f"    {' '.join(row)}" for row in rows)]


def explanation_lines(result: Explanation) -> list[str]:
    """Return the lines that show an explanation's numbers."""
    lines = []
    if result.entropies.size:
        lines.append(f"  entropies of the routing: {' '.join(f'{one:.3f}' for one in result.entropies)}")
    for one in result.classes:
        if one.contributions.size:
            lines.append(f"  largest contributions to {one.label}:")
            lines += _contribution_lines(one, result.primary_capsules)
    return lines


def _contribution_lines(explanation: ClassExplanation, capsules: PrimaryCapsules) -> list[str]:
    contributions = explanation.contributions
    largest = np.argsort(-contributions, kind="stable")[:_SHOWN_CAPSULES].tolist()
    lines = []
    for capsule in largest:
        kind = capsule // (capsules.rows * capsules.columns)
        row, column = capsules.centre(capsule)
        lines.append(f"    {contributions[capsule]:+.3f} from type {kind} around row {row:.0f}, column {column:.0f}")
    return lines
