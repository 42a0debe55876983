"""The search for inner text in errors: what a client must never be told about the inside of the server."""

import re

#: Signs of Python's and ONNX Runtime's inside: exceptions, source files, addresses of objects, paths of files.
_INNER = re.compile(
    r"Traceback|\b[A-Z]\w*Error\b|\b\w*Exception\b|\.py\b|\.onnx\b|\.json\b|site-packages|onnxruntime|\b0x[0-9a-f]{10,}"
    r"|<class|object at|(?:^|[\s'\"(])/(?:usr|home|root|tmp|var|etc|opt|work|proc|dev)/",
)


def inner_text(text: str) -> str:
    """Return the first sign of inner text in an error, or "" if it has none."""
    found = _INNER.search(text)
    return found[0].strip() if found else ""
