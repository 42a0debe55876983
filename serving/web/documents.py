"""The documents about the routes: OpenAPI, and a page of HTML for people, which needs nothing from elsewhere."""

from collections.abc import Awaitable, Callable
from html import escape
from pathlib import Path
from typing import cast

from serving.transport.methods import Context, Method, UnaryMethod
from serving.web.json_messages import Json, write_json
from serving.web.openapi import Schema, describe
from serving.web.page import PageFile, page_file, read_page
from serving.web.routes import DESCRIBE, DOCUMENT

_FOLDER = Path(__file__).parent
_PAGE = _FOLDER / "page"
_STYLE = _FOLDER / "documentation.css"
_ICON = "/icon.svg"
_EXAMPLES = (
    ("Classify a picture", "curl -F image=@digit.png -F preprocess=auto {server}/v1/classify"),
    ("The same without a form", "curl --data-binary @digit.png -H 'Content-Type: image/png' {server}/v1/classify"),
    ("Explain an answer", "curl -F image=@digit.png -F parts=routing,contributions {server}/v1/explain"),
    (
        "Turn a knob of the pose, and get the picture",
        "curl -F image=@digit.png -F changes=3:0.1 -H 'Accept: image/png' {server}/v1/reconstruct -o drawn.png",
    ),
    ("With a token", "curl -H 'Authorization: Bearer TOKEN' {server}/v1/model"),
)


def documents(version: str) -> dict[str, Method]:
    """Return the methods that answer with the documents. version: the server's own."""
    description = describe(version)
    return {
        DESCRIBE: UnaryMethod(_answering(write_json(description))),
        DOCUMENT: UnaryMethod(_answering(_html(description))),
    }


def page_files() -> dict[str, PageFile]:
    """Return the files for everyone by path: those of the page, and the style of the documentation.

    Browsers ask for ``/favicon.ico`` beside documents that name no icon, such as JSON; they get that of the page.
    """
    files = read_page(_PAGE)
    files[f"/{_STYLE.name}"] = page_file(_STYLE.read_bytes(), "text/css; charset=utf-8")
    if icon := files.get(_ICON):
        files["/favicon.ico"] = icon
    return files


def _answering(content: bytes) -> Callable[[bytes, Context], Awaitable[bytes]]:
    async def answer(data: bytes, context: Context) -> bytes:
        return content

    return answer


def _html(description: Schema) -> bytes:
    """Return the page about the routes."""
    paths = cast("dict[str, dict[str, Schema]]", description["paths"])
    schemas = cast("dict[str, Schema]", cast(Schema, description["components"])["schemas"])
    operations = [(path, verb, one) for path, item in paths.items() for verb, one in item.items()]
    body = [
        "<h1>capsnet-serving over HTTP</h1>",
        '<p>For programs: <a href="/openapi.json">openapi.json</a>. Errors are problem details (RFC 9457) with the '
        "wrong fields in <code>field_violations</code>.</p>",
        "<h2>Examples</h2>",
        *(f"<h3>{escape(title)}</h3><pre>{escape(text.format(server='http://localhost:8000'))}</pre>"
          for title, text in _EXAMPLES),
        "<h2>Paths</h2>",
        *(_operation(path, verb, one) for path, verb, one in operations),
        "<h2>Messages</h2>",
        *(_message(name, schema) for name, schema in sorted(schemas.items())),
    ]  # fmt: skip
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>capsnet-serving</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="{_ICON}" type="image/svg+xml"><link rel="stylesheet" href="/{_STYLE.name}"></head>'
        "<body><main>"
    )
    return "\n".join((head, *body, "</main></body></html>\n")).encode()


def _operation(path: str, verb: str, operation: Schema) -> str:
    rows = [
        f"<tr><td><code>{escape(str(one['name']))}</code></td><td>{escape(str(one['in']))}</td>"
        f"<td>{escape(str(one.get('description', '')))}</td></tr>"
        for one in cast("list[Schema]", operation.get("parameters", []))
    ]
    table = f"<table><tr><th>parameter</th><th>in</th><th>meaning</th></tr>{''.join(rows)}</table>" if rows else ""
    bodies = cast(Schema, cast(Schema, operation.get("requestBody", {})).get("content", {}))
    content = ", ".join(f"<code>{escape(media)}</code>" for media in bodies)
    answer = cast(Schema, cast("dict[str, Schema]", operation["responses"])["200"].get("content", {}))
    references = [_shown(cast(Schema, one)["schema"]) for one in (*bodies.values(), *answer.values())]
    linked = ", ".join(dict.fromkeys(one for one in references if "href" in one))
    return (
        f"<section><h3><code>{verb.upper()} {escape(path)}</code></h3><p>{escape(str(operation['summary']))}."
        + (f" Messages: {linked}." if linked else "")
        + (f" Body: {content}." if content else "")
        + f"</p>{table}</section>"
    )


def _message(name: str, schema: Schema) -> str:
    properties = cast("dict[str, Schema]", schema.get("properties", {}))
    rows = "".join(
        f"<tr><td><code>{escape(one)}</code></td><td>{_shown(properties[one])}</td></tr>" for one in properties
    )
    return f'<section id="{escape(name)}"><h3>{escape(name)}</h3><table>{rows}</table></section>'


def _shown(schema: Json) -> str:
    """Return a schema in short, in HTML."""
    if not isinstance(schema, dict):
        return ""
    if "$ref" in schema:
        name = escape(str(schema["$ref"]).rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "enum" in schema:
        return ", ".join(escape(str(one)) for one in cast("list[Json]", schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {_shown(schema.get('items')) or 'values'}"
    kinds = schema.get("type", "")
    encoded = " (base64)" if "contentEncoding" in schema else ""
    return escape(", ".join(map(str, kinds)) if isinstance(kinds, list) else str(kinds)) + encoded
