"""The runs in a folder, by their logs."""
