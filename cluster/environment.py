"""The environment of worker processes, whoever starts them."""

from erann_dist.environment import KEEP_MEMORY

WORKER_ENVIRONMENT = KEEP_MEMORY | {"OMP_NUM_THREADS": "1", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
