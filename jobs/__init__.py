"""What users run: the `erann` command and the jobs it starts."""
