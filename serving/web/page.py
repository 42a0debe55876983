"""The files of a page for browsers, which the server sends as they are."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

#: The media types of the files that are sent, by the end of their names.
MEDIA = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".jpg": "image/jpeg",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}
_INDEX = "index.html"
_ETAG_CHARACTERS = 32


@dataclass(frozen=True)
class PageFile:
    """A file. tag: its entity tag (RFC 9110, section 8.8.3)."""

    content: bytes
    media: str
    tag: str


def read_page(folder: Path) -> dict[str, PageFile]:
    """Return the files of a folder and the folders in it, by their paths; the index also as ``/``."""
    files: dict[str, PageFile] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in MEDIA:
            files["/" + path.relative_to(folder).as_posix()] = page_file(path.read_bytes(), MEDIA[path.suffix])
    if f"/{_INDEX}" in files:
        files["/"] = files[f"/{_INDEX}"]
    return files


def page_file(content: bytes, media: str) -> PageFile:
    """Return a file of this content."""
    return PageFile(content, media, f'"{hashlib.sha256(content).hexdigest()[:_ETAG_CHARACTERS]}"')
