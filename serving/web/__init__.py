"""HTTP: the method table of gRPC behind REST routes, with JSON, pictures and a documentation page."""
