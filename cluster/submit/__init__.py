"""Submits commands to a Ray cluster as jobs."""
