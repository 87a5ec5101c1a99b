"""From a data set on disk to a verified shard set. It knows nothing of Ray."""
