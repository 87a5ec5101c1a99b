"""Files from outside, checked once, where they are read: JSON, YAML and Parquet."""
