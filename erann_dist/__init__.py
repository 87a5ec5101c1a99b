"""The library: a clip, a shard set, the model, the sampler, the loader, one training loop. It knows nothing of Ray."""

SAMPLE_RATE = 44_100  # Hz, that ERANN takes; here, so that packing needs no torch
