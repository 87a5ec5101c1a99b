"""Whether a cluster is ready for a run."""
