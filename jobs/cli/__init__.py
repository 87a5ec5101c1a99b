"""The `erann` command."""
