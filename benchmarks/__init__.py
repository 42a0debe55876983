"""Measurements of the project. Each is a command that a reader can repeat on another machine."""
