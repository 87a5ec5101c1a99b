"""From a data set on disk to a verified shard set. It does not depend on Ray."""
