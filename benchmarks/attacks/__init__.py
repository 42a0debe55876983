"""Attacks on the server by hostile clients, and the service that a client in good faith still gets beside them."""
