"""File formats and folders that the server, the client and training share."""
