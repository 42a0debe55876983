"""``python -m serving``: serve a model."""

import logging
import os
import signal
import sys
from types import FrameType

# The freed blocks that the C library must return at once, in bytes, by transport. gRPC's core reads large messages into
# blocks of 64 KiB. This server joins messages, which are smaller than 1 MiB if they are no large pictures.
_MIN_RETURNED_BYTES = {"native": 2**20, "grpcio": 2**16}


def main() -> int:
    """Serve until a signal, and return the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):  # until the server has its own handlers
        signal.signal(number, _end_at_once)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it asks for a scan of the models, and the start scans them anyway
    # Otherwise gRPC's core would write a line for each wrong frame of a client, with the client's bytes in it.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # Imported only now, since it takes a second, in which Ctrl-C would print a traceback.
    import asyncio
    import warnings

    from serving.files.program import missing_package

    try:
        from serving.settings import read, service_links

        settings = read(sys.argv[1:])
        import uvloop

        from serving.artifact import ArtifactError
        from serving.files.images import limit_metadata
        from serving.logs import set_up
        from serving.runtime import RuntimeSetupError, keep_little_free_memory
        from serving.server import StartError, serve
    except ModuleNotFoundError as error:
        print(f"cannot start: {missing_package(error, 'cpu')}", file=sys.stderr)
        return 1
    warnings.filterwarnings("ignore", module="PIL")  # about clients' files, with text that clients choose
    limit_metadata()
    keep_little_free_memory(_MIN_RETURNED_BYTES[settings.transport])
    set_up(settings.log_format, settings.log_level)
    if links := service_links(os.environ):
        logging.getLogger(__name__).warning(
            "passed over, since Kubernetes sets them for a Service and they are no settings: %s "
            "(enableServiceLinks: false in the pod leaves them out)",
            ", ".join(links),
        )
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            served = runner.run(serve(settings))
    except (ArtifactError, RuntimeSetupError, StartError) as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if not served:
        # The interpreter's own end would pull ONNX Runtime away from under the thread that still loads it, and abort.
        logging.shutdown()
        os._exit(0)
    return 0


def _end_at_once(number: int, _: FrameType | None) -> None:
    """End the process before it serves. The interpreter's own exit would print a traceback."""
    print("stopped before the start", file=sys.stderr, flush=True)
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
