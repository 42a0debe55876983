"""Options of commands: one dataclass field defines an option's flag, default, choices, help and check.

``option`` declares a field. ``__post_init__`` calls ``check``. ``add_flags`` comes before argparse, ``read`` after it.
Other fields of the dataclass are ignored.
"""

import argparse
import math
from collections.abc import Callable, Collection
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

_METADATA_KEY = "option"
_DEFAULT_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}

T = TypeVar("T")
Parse = Callable[[str], Any]


@dataclass(frozen=True)
class Option:
    """The definition of an option, except for its name and its default.

    parse: converts a flag's text to the value; raises ValueError or ArgumentTypeError.
    count: the number of texts that the flag takes, "+" for one or more; then its value is a tuple.
    shown: the default in the help's words, or empty to leave it out.
    minimum and maximum are allowed values; above and below are limits that are not allowed themselves.
    """

    help: str
    parse: Parse | None = None
    choices: Collection[str] = ()
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    metavar: str | tuple[str, ...] = ""
    count: int | str | None = None
    shown: str | None = None


def option(default: Any, help_: str, **said: Any) -> Any:
    """Return a dataclass field with this default. ``said`` holds further arguments of ``Option``."""
    return field(default=default, metadata={_METADATA_KEY: Option(help_, **said)})


def check(options: object) -> None:
    """Raise ValueError, with the field's name, for the first value that its option does not allow.

    None is allowed if it is the default. Floats must be finite.
    """
    for one, said in _options(type(options)):
        value = getattr(options, one.name)
        if value is None and one.default is None:
            continue
        if expected := _expected(value, said):
            shown = repr(value) if isinstance(value, str) else value
            raise ValueError(f"{one.name}: {shown}; expected {expected}")


def _expected(value: Any, said: Option) -> str:
    """Return a description of the allowed values, or "" if this value is allowed."""
    if said.choices:
        return "" if value in said.choices else f"one of {', '.join(said.choices)}"
    if said.minimum is not None and not value >= said.minimum:  # false for NaN too
        return f"{said.minimum:g} or more"
    if said.above is not None and not value > said.above:
        return f"a number above {said.above:g}"
    if said.maximum is not None and not value <= said.maximum:
        return f"{said.maximum:.0f} or less"
    if said.below is not None and not value < said.below:
        return f"a number below {said.below:g}"
    return "a finite number" if isinstance(value, float) and not math.isfinite(value) else ""


def add_flags(parser: argparse._ActionsContainer, cls: type) -> None:
    """Add a flag for each option of a dataclass. Flags that are not given are absent from argparse's result."""
    for one, said in _options(cls):
        shown = str(one.default) if said.shown is None else said.shown
        text = f"{said.help} (default: {shown})" if shown else said.help
        flag = "--" + one.name.replace("_", "-")
        if isinstance(one.default, bool) or said.parse is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
            continue
        parse = said.parse or (str if one.default is None else type(one.default))
        metavar = said.metavar or ("{" + ",".join(said.choices) + "}" if said.choices else _DEFAULT_METAVARS.get(parse))
        parser.add_argument(flag, type=parse, nargs=said.count, metavar=metavar, default=argparse.SUPPRESS, help=text)


def read(cls: type[T], parsed: argparse.Namespace) -> T:
    """Make the dataclass from the given flags. Raises ValueError like its check."""
    given = {one.name: value for one, _ in _options(cls) if (value := getattr(parsed, one.name, None)) is not None}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _options(cls: type) -> list[tuple[Field[Any], Option]]:
    return [(one, one.metadata[_METADATA_KEY]) for one in fields(cls) if _METADATA_KEY in one.metadata]


def option_of(one: Field[Any]) -> Option:
    """Return the ``Option`` of a field."""
    said: Option = one.metadata[_METADATA_KEY]
    return said
