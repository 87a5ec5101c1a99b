"""Storage on a disk or in a bucket."""
