"""Code that server, client, training and export share: file formats, folders, and options."""
