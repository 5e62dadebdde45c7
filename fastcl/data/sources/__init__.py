"""Data sets by name: images, classes and splits."""
