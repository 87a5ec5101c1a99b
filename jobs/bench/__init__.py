"""Benchmarks, each of which interleaves the variants it compares and reports their ratio."""
