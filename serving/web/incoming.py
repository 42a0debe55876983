"""An HTTP request that has been read, and its answer before it is sent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message as Header

from serving.web.problems import invalid

#: The media types of JSON and of bytes.
JSON, BYTES = "application/json", "application/octet-stream"
# The most parameters of a header. Their parser takes a time that grows with the square of their number.
_MAX_PARAMETERS = 8


def check_parameters(field: str, given: int) -> None:
    """Raise Problem if a header has too many parameters."""
    if given > _MAX_PARAMETERS:
        raise invalid(field, f"expected at most {_MAX_PARAMETERS} parameters")


@dataclass(frozen=True)
class BodyLimits:
    """The limits of a body. images: the most pictures. image_bytes: the largest picture, in bytes."""

    images: int
    image_bytes: int


@dataclass(frozen=True)
class Incoming:
    """A request.

    place: the parameters in its path. query: the parameters after the question mark, in their order. headers: by name
    in lower case.
    """

    place: Mapping[str, str]
    query: Sequence[tuple[str, str]]
    headers: Mapping[str, str]
    body: bytes
    limits: BodyLimits

    @property
    def content_type(self) -> tuple[str, str]:
        """Return the body's media type in lower case, and the boundary of its parts or "". Raises Problem."""
        given = self.headers.get("content-type", "")
        check_parameters("content-type", given.count(";"))
        header = Header()
        header["content-type"] = given
        return given.partition(";")[0].strip().lower(), str(header.get_param("boundary", "") or "")

    def accepts(self, media: str) -> bool:
        """Return True if the client names a media type as one that it takes."""
        for one in self.headers.get("accept", "").lower().split(","):
            name, *parameters = (part.strip() for part in one.split(";"))
            if name == media:
                return not any(part.replace(" ", "") in ("q=0", "q=0.0", "q=0.00", "q=0.000") for part in parameters)
        return False


@dataclass(frozen=True)
class Reply:
    """An answer."""

    body: bytes
    media: str = JSON
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
