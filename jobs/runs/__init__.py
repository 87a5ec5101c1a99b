"""The runs in a folder, as recorded in their logs."""
