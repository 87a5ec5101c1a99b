"""What processes that work on large buffers start with."""

# glibc gives large buffers back to the system when they are freed and asks for them anew for the next clip or step, at
# a cost of up to a tenth of packing and a fifth of a training step on CPU. It reads these before a process starts.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
