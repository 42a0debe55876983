"""``python -m serving``: serve a model."""

import logging
import os
import signal
import sys
from types import FrameType

# The freed blocks that the C library must return at once, in bytes, by transport. gRPC's core reads large messages into
# blocks of 64 KiB. This server joins messages, which are smaller than 1 MiB if they are no large pictures.
_MIN_RETURNED_BYTES = {"native": 2**20, "grpcio": 2**16}

# The time after which a thread leaves Python's lock to another one that waits. A batch takes the lock several times,
# and waited for Python's own 5 ms each time while a client kept the event loop busy (see benchmarks/README.md).
_SWITCH_SECONDS = 0.0005


def main() -> int:
    """Serve until a signal, and end the process. Return the exit status if it cannot begin."""
    for number in (signal.SIGINT, signal.SIGTERM):  # until the server has its own handlers
        signal.signal(number, _end_at_once)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it asks for a scan of the models, and the start scans them anyway
    # Otherwise gRPC's core would write a line for each wrong frame of a client, with the client's bytes in it.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # Imported only now, since it takes a second, in which Ctrl-C would print a traceback.
    import asyncio
    import gc
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
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.freeze()  # a collection would look at all that was imported, for 50 ms, while all calls wait
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings))
        status = 0
    except (ArtifactError, RuntimeSetupError, StartError) as error:
        print(f"cannot start: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    # The interpreter's own end may stop a thread inside ONNX Runtime, which still loads a model, or inside gRPC's core,
    # and the process would abort.
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


def _end_at_once(number: int, _: FrameType | None) -> None:
    """End the process before it serves. The interpreter's own exit would print a traceback."""
    print("stopped before the start", file=sys.stderr, flush=True)
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
