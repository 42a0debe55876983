"""gRPC over HTTP/2 on asyncio: a server for the handlers that ``grpc.aio.Server`` takes.

The network's own time apart, a request through ``grpc.aio`` costs most of what a small capsule network costs. This one
is limited to what a server of few methods and many small messages needs, which makes it many times cheaper, see
benchmarks/README.md. It follows RFC 9113 (HTTP/2), RFC 7541 (HPACK, by the library ``hpack``) and gRPC's
``PROTOCOL-HTTP2.md``. It knows nothing of capsule networks.
"""
