"""The clips of a shard set: which a run selects, in which order, and their sound as batches."""
