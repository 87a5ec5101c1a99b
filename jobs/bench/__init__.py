"""Measurements, each a ratio of things that are run side by side, in turns."""
