"""The environment of worker processes, whoever starts them."""

# What worker processes start with. glibc gives large buffers back to the system after each step and asks for them anew
# in the next, at a cost of up to a fifth of a step on CPU; it reads these before a process starts.
WORKER_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_NUM_THREADS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
