"""Options said once: one dataclass field makes an option's flag, default, choices, help and check.

``option`` declares a field, ``check`` belongs into ``__post_init__``, ``add_flags`` and ``read`` stand on both sides of
argparse. Fields that are declared otherwise are left alone.
"""

import argparse
import math
from collections.abc import Callable, Collection
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

_KEY = "option"
_DEFAULT_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}

T = TypeVar("T")
Parse = Callable[[str], Any]


@dataclass(frozen=True)
class Option:
    """A field's part of its command, beside its name and its default.

    parse: from a flag's text to the value; raises ValueError or ArgumentTypeError. count: how many texts the flag
    takes, "+" for one or more; its value is a tuple then. shown: the default as the help names it, empty for not at
    all. minimum and maximum are allowed values; above and below are the first that are not.
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
    """Return a dataclass field with this default; ``said`` is what ``Option`` takes."""
    return field(default=default, metadata={_KEY: Option(help_, **said)})


def check(options: object) -> None:
    """Raise ValueError, naming the field, at the first value that its option does not allow.

    None is allowed where it is the default. No float may be infinite or no number.
    """
    for one, said in _options(type(options)):
        value = getattr(options, one.name)
        if value is None and one.default is None:
            continue
        if expected := _expected(value, said):
            shown = repr(value) if isinstance(value, str) else value
            raise ValueError(f"{one.name}: {shown}; expected {expected}")


def _expected(value: Any, said: Option) -> str:
    """Return the values that would be allowed, or nothing where this one is."""
    if said.choices:
        return "" if value in said.choices else f"one of {', '.join(said.choices)}"
    if said.minimum is not None and not value >= said.minimum:  # nor is no number
        return f"{said.minimum:g} or more"
    if said.above is not None and not value > said.above:
        return f"a number above {said.above:g}"
    if said.maximum is not None and not value <= said.maximum:
        return f"{said.maximum:.0f} or less"
    if said.below is not None and not value < said.below:
        return f"a number below {said.below:g}"
    return "a finite number" if isinstance(value, float) and not math.isfinite(value) else ""


def add_flags(parser: argparse._ActionsContainer, cls: type) -> None:
    """Add a flag for each option of a dataclass; those that are not given are left out of argparse's result."""
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
    """Make the dataclass of the flags that were given. Raises ValueError as its check does."""
    given = {one.name: value for one, _ in _options(cls) if (value := getattr(parsed, one.name, None)) is not None}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _options(cls: type) -> list[tuple[Field[Any], Option]]:
    return [(one, one.metadata[_KEY]) for one in fields(cls) if _KEY in one.metadata]


def option_of(one: Field[Any]) -> Option:
    """Return what ``option`` was told for a field."""
    said: Option = one.metadata[_KEY]
    return said
