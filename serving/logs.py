"""The log: text for people or JSON for programs, with a line for each refused or failed request.

Clients cause many lines and some of their text. So each line is limited in number, and no text looks like another line.
"""

import json
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from itertools import islice
from types import TracebackType
from typing import TextIO

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
#: Attribute of a record that holds a dictionary of further fields.
FIELDS = "fields"
#: The most lines a second of one kind.
MAX_LINES_A_SECOND = 50
_COLOURS = {logging.DEBUG: 2, logging.INFO: 32, logging.WARNING: 33, logging.ERROR: 31}  # ANSI: faint, green, ...
_PLAIN_VALUE = re.compile(r"[^\s\"=]*")

_logger = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """A formatter that writes a record as one line of JSON.

    The line has time, level, logger, message, the record's fields, and a traceback.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class TextFormatter(logging.Formatter):
    """A formatter that writes a record as a line of text, with its fields after the message.

    The lines of a traceback are indented, and a value with spaces is quoted, so that neither passes for another line or
    another field.

    colour: with True, the levels are coloured for a terminal.
    """

    def __init__(self, colour: bool = False) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._colour = colour

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = getattr(record, FIELDS, {}).items()
        shown = "".join(f" {name}={_one_word(str(value))}" for name, value in fields)
        line = _on_one_line(super().formatMessage(record)) + shown
        colour = _COLOURS.get(record.levelno) if self._colour else None
        # The level is the first word in letters.
        return line.replace(record.levelname, f"\x1b[{colour}m{record.levelname}\x1b[0m", 1) if colour else line

    def formatException(
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        return "\n".join(f"    {_on_one_line(line)}" for line in super().formatException(ei).splitlines())


class FloodFilter(logging.Filter):
    """A filter that lets only so many records a second pass from each place of the code.

    limit: the most records a second. The first record after a flood has the number of those left out as a field.
    Records with fields of their own pass, since RefusalLog has limited them.
    """

    def __init__(self, limit: int = MAX_LINES_A_SECOND) -> None:
        super().__init__()
        self._limit = limit
        self._seen: dict[tuple[str, int], tuple[int, int]] = {}  # by place: the second, and the records in it

    def filter(self, record: logging.LogRecord) -> bool:
        if hasattr(record, FIELDS):
            return True
        place, second = (record.pathname, record.lineno), int(record.created)
        last, records = self._seen.get(place, (second, 0))
        if second != last:
            if (more := records - self._limit) > 0:
                setattr(record, FIELDS, {"left_out": more})
            records = 0
        self._seen[place] = second, records + 1
        return records < self._limit


def shows_colours(stream: TextIO) -> bool:
    """Return True for a terminal, unless the environment asks for no colours (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def counted(number: int, one: str, several: str = "") -> str:
    """Return a number and its noun, as in "1 batch" and "2 batches". several: the plural, if not with an s alone."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def set_up(format_: str, level: str) -> None:
    """Send the log of this process to standard error. format_: one of FORMATS. level: one of LEVELS."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if format_ == "json" else TextFormatter(shows_colours(handler.stream)))
    handler.addFilter(FloodFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("hpack").setLevel(logging.INFO)  # its debug log shows tokens


class RefusalLog:
    """The log of what clients cause, such as refused and failed requests, with a limit.

    limit: the most lines a second. Of further ones only the number is logged: in a flood of refusals, the log must not
    cost the time that refusals save. events: the words of that line for them.
    """

    def __init__(self, limit: int = MAX_LINES_A_SECOND, events: str = "requests were refused or failed") -> None:
        self._limit = limit
        self._events = events
        self._second = 0
        self._lines = 0

    def write(self, level: int, text: str, events: Iterable[Mapping[str, str]], count: int) -> None:
        """Log events that have the same text.

        events: the further fields of each of them; those of one are read for each line
        that is written. count: their number.
        """
        second = int(time.monotonic())
        if second != self._second:
            if (more := self._lines - self._limit) > 0:
                _logger.warning("%d more %s in a second", more, self._events)
            self._second, self._lines = second, 0
        room = self._limit - self._lines
        self._lines += count
        for fields in islice(events, max(0, room)):
            shown = {name: _on_one_line(value) for name, value in fields.items()}
            _logger.log(level, "%s", _on_one_line(text), extra={FIELDS: shown})


def _on_one_line(text: str) -> str:
    """Escape unprintable characters, so that a client's text cannot look like another line of the log."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _one_word(text: str) -> str:
    """Quote a field's value that is no plain word."""
    return text if text and _PLAIN_VALUE.fullmatch(text) else json.dumps(text, ensure_ascii=False)
