"""Runs work on machines: launchers, the embedded Ray cluster, job submission, cluster files."""
