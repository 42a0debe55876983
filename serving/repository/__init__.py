"""Models that are served: found, loaded, tuned, swapped and unloaded."""
