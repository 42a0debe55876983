"""Measurements of the project, each a command to be repeated on one's own machine."""
