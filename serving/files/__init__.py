"""What the server, the client, training and export share: file formats, folders, and options that are said once."""
