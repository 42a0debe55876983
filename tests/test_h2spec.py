"""Conformance by h2spec, where it is on the PATH: its cases of RFC 7540 and RFC 7541, against the native transport.

h2spec sends requests to a website. So the server of these tests takes any request for a call of gRPC.
"""

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from serving.transport import headers
from serving.transport.methods import Context, StreamMethod
from tests.transport_methods import Handlers, serve

#: The cases that this server does not pass, by section and description, and the reason.
EXCEPTIONS = {
    ("http2/5.1", "closed: Sends a HEADERS frame"): "RFC 9113 asks for no connection error; the stream is reset",
    ("http2/5.3.1", "Sends HEADERS frame that depends on itself"): "RFC 9113 has no priorities",
    ("http2/5.3.1", "Sends PRIORITY frame that depend on itself"): "RFC 9113 has no priorities",
}
_CASES = 146
_CALLS = 10  # that a client may have open: h2spec tries one more


def as_call(fields: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers of a request as those of a call. What is wrong with them stays wrong."""
    named = [(name, b"POST" if (name, value) == (b":method", b"GET") else value) for name, value in fields]
    others = [field for field in named if field[0] != b"content-type"]
    return [*others, (b"content-type", b"application/grpc")]


async def greet(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
    """Answer at once, and end some time after the client, so that its frames meet an open stream."""
    yield b"hello"
    async for _ in requests:
        pass
    await asyncio.sleep(0.2)


@pytest.mark.skipif(not shutil.which("h2spec"), reason="h2spec is not on the PATH")
def test_all_cases_but_the_named_ones_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request: Callable[..., Any] = vars(headers)["_request"]
    monkeypatch.setattr(headers, "_request", lambda fields, find: request(as_call(fields), find))
    table = Handlers.table
    monkeypatch.setattr(Handlers, "table", lambda handlers: {**table(handlers), "/": StreamMethod(greet)})
    report = tmp_path / "report.xml"
    with serve(limits={"calls_per_connection": _CALLS}) as serving:
        command = ["h2spec", "--port", str(serving.port), "--timeout", "2", "--junit-report", str(report)]
        subprocess.run(command, capture_output=True, timeout=300, check=False)
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert len(cases) >= _CASES and not [case for case in cases if case.find("skipped") is not None]
    failed = {
        (case.get("package"), case.get("classname"))
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    }
    assert failed == EXCEPTIONS.keys()
