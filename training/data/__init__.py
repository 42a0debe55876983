"""Data sets: where they come from, how they are read, composed and augmented."""
