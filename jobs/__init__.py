"""What people run: the `erann` command and the jobs behind it."""
