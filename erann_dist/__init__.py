"""The library: clips, shard sets, models, samplers, the loader and one training loop. It does not depend on Ray."""

import os
import pwd

# On the AMX units of some CPUs, bf16 convolutions read uninitialised memory and occasionally return NaN (torch 2.11).
# oneDNN reads this variable at the first convolution.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

# In a container the user id may have no name. At the first step torch looks it up to name a cache folder and would fail
# with a KeyError; other libraries do the same.
try:
    pwd.getpwuid(os.getuid())
except KeyError:
    os.environ.setdefault("USER", f"uid-{os.getuid()}")

SAMPLE_RATE = 44_100  # Hz, ERANN's input; defined here so that packing does not import torch
