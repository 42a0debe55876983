"""The edge between a transport and the services: status codes, refusals, metrics and traces of RPCs."""
