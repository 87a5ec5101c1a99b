"""Making, checking and describing shard sets."""
