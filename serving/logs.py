"""The log: text for people or JSON for programs, with a line for each refused or failed request."""

import json
import logging
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import islice

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
#: Attribute of a record that holds a dictionary of further fields.
FIELDS = "fields"

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
    """A formatter that writes a record as a line of text, with its fields after the message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in getattr(record, FIELDS, {}).items())
        return super().formatMessage(record) + fields


def set_up(format_: str, level: str) -> None:
    """Send the log of this process to standard error. format_: one of FORMATS. level: one of LEVELS."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if format_ == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("hpack").setLevel(logging.INFO)  # its debug log shows tokens


class RefusalLog:
    """The log of refused and failed requests, with a limit.

    limit: the most lines a second. Of further requests only the number is logged: in a flood of refusals, the log must
    not cost the time that refusals save.
    """

    def __init__(self, limit: int = 50) -> None:
        self._limit = limit
        self._second = 0
        self._lines = 0

    def write(
        self,
        level: int,
        method: str,
        code: str,
        text: str,
        request_ids: Iterable[str],
        requests: int,
        peer: str = "",
    ) -> None:
        """Log requests that have the same error.

        text: the text of the error. requests: the number of requests. request_ids: their ids; one is read for each line
        that is written. peer: the client's address, or "".
        """
        second = int(time.monotonic())
        if second != self._second:
            if (more := self._lines - self._limit) > 0:
                _logger.warning("%d more requests were refused or failed in a second", more)
            self._second, self._lines = second, 0
        room = self._limit - self._lines
        self._lines += requests
        for request_id in islice(request_ids, max(0, room)):
            fields = {"method": method, "code": code, "request_id": _on_one_line(request_id)}
            if peer:
                fields["peer"] = _on_one_line(peer)
            _logger.log(level, "%s", _on_one_line(text), extra={FIELDS: fields})


def _on_one_line(text: str) -> str:
    """Escape unprintable characters, so that a client's text cannot look like another line of the log."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
