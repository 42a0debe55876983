"""Code that server, client, training and export share: file formats, folders, options, and occlusion."""
