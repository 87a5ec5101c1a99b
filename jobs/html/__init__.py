"""Shared code of the HTML pages and images."""
