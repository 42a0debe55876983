"""gRPC over HTTP/2 on asyncio: two servers of one typed method table.

The native server is limited to what a server of few methods and many small messages needs, which makes it many times
cheaper than gRPC's own, see benchmarks/README.md. It follows RFC 9113 (HTTP/2), RFC 7541 (HPACK, by the library
``hpack``) and gRPC's ``PROTOCOL-HTTP2.md``. What parses bytes or decides is pure (frames, headers, messages, sending,
memory, patience); connection and server own the sockets and the timers. The other server, in grpcio_server, is
``grpc.aio`` under the same table. Nothing here knows of capsule networks.
"""
