"""The library: a clip, a shard set, the model, the sampler, the loader, one training loop. It knows nothing of Ray."""

import os

# bf16 convolutions by the AMX units of some CPUs read memory that nothing has written, and give NaN now and then
# (torch 2.11). The variable is read when the first one is computed.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

SAMPLE_RATE = 44_100  # Hz, that ERANN takes; here, so that packing needs no torch
