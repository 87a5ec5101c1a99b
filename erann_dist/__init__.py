"""The library: a clip, a shard set, the model, the sampler, the loader, one training loop. It knows nothing of Ray."""
