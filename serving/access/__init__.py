"""Access: who may call. TLS certificates, tokens, roles, and the limits of each client."""
