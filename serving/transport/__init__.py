"""gRPC over HTTP/2 on asyncio: two servers of one typed method table.

The native server does only what a server of few methods and many small messages needs. So it is many times cheaper than
gRPC's own server, see benchmarks/README.md. It follows RFC 9113 (HTTP/2), RFC 7541 (HPACK, with the library ``hpack``)
and gRPC's ``PROTOCOL-HTTP2.md``. The modules that parse bytes or make decisions are pure: frames, headers, messages,
sending, memory, patience, connection_limits. The modules connection and server own the sockets and the timers. The
other server, in grpcio_server, runs ``grpc.aio`` with the same table. This package does not depend on capsule networks.
"""
