"""Training with steps that a GPU records once and replays, for many small networks side by side."""
