"""Data sets: their sources, readers, composition and augmentation."""
