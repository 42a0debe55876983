"""Bytes of strangers for every reader of the project: only the documented errors may leave it."""
