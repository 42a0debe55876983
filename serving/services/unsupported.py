"""The methods of Triton's service that a port lacks, each with an answer that says what to do instead."""

from collections.abc import Mapping

from serving.errors import Unsupported
from serving.rpc.edge import Edge
from serving.transport.methods import Abort, Context, Method, UnaryMethod

_MEMORY = "shared memory is not supported; send the tensors in the messages"
_TRACES = "settings of traces are not supported; the server's --trace-endpoint sends traces of OpenTelemetry"
_LOGS = "settings of the log are not supported; the server's --log-level sets what is logged"
_LOADING = (
    "not on this port; the server's --admin-port opens a port for loading and unloading of models. "
    "Versions that are new in the folder of models are served without a call"
)
#: The reasons of the port of clients, by method.
LACKING = {
    "SystemSharedMemoryStatus": _MEMORY,
    "SystemSharedMemoryRegister": _MEMORY,
    "SystemSharedMemoryUnregister": _MEMORY,
    "CudaSharedMemoryStatus": _MEMORY,
    "CudaSharedMemoryRegister": _MEMORY,
    "CudaSharedMemoryUnregister": _MEMORY,
    "TraceSetting": _TRACES,
    "LogSettings": _LOGS,
    "RepositoryModelLoad": _LOADING,
    "RepositoryModelUnload": _LOADING,
}
#: The reason of the administration port for the methods of the port of clients.
ELSEWHERE = "not on this port, which loads and unloads models; the server's --port has this method"


def refusals(edge: Edge, service: str, reasons: Mapping[str, str]) -> dict[str, Method]:
    """Return methods that answer UNIMPLEMENTED with their reason, and count and log each call. By method name."""
    return {name: _refusing(edge, f"/{service}/{name}", f"{name}: {reason}") for name, reason in reasons.items()}


def _refusing(edge: Edge, path: str, text: str) -> Method:
    async def answer(data: bytes, context: Context) -> bytes:
        raise Abort(edge.denied(path, context.peer, context.invocation_metadata(), Unsupported(text)))

    return UnaryMethod(answer)
