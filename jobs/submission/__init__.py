"""Commands made ready for a cluster."""
