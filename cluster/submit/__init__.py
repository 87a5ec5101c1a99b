"""Commands sent to a Ray cluster by its job submission."""
