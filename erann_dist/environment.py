"""What worker processes start with."""

import ctypes
import signal

# glibc gives large buffers back to the system when they are freed and asks for them anew for the next clip or step, at
# a cost of up to a tenth of packing and a fifth of a training step on CPU. It reads these before a process starts.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it is killed; it would work on, for nobody."""
    prctl_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(prctl_set_pdeathsig, signal.SIGKILL)
