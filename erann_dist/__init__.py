"""The library: a clip, a shard set, the model, the sampler, the loader, one training loop. It knows nothing of Ray."""

import os
import pwd

# bf16 convolutions by the AMX units of some CPUs read memory that nothing has written, and give NaN now and then
# (torch 2.11). The variable is read when the first one is computed.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

# A container's user id may have no name. torch asks for one, for a folder of its caches, at the first step, and would
# end with a KeyError; so do other libraries.
try:
    pwd.getpwuid(os.getuid())
except KeyError:
    os.environ.setdefault("USER", f"uid-{os.getuid()}")

SAMPLE_RATE = 44_100  # Hz, that ERANN takes; here, so that packing needs no torch
