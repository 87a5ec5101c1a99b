"""A run's events, its log, and the other sinks of its events."""
