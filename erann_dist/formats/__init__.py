"""External files (JSON, YAML and Parquet), checked once, where they are read."""
