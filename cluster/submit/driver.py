"""A submitted job's first process, on the cluster's head: `python -m cluster.submit.driver pretrain audioset.yaml …`.

It runs the `erann` command if the cluster has the versions that the job was submitted with. If the command is killed,
for example when memory runs out, it is started again and resumes from its last checkpoint.
"""

import json
import os
import signal
import subprocess
import sys

from cluster.submit.package import BY_PIP, versions

VERSIONS = "ERANN_VERSIONS"  # Variable in the job's environment with the client's versions, as JSON.
_STARTS = 4


def what_differs(client: dict[str, str], here: dict[str, str]) -> str | None:
    """One line on the versions that differ between client and cluster, with a fix; None if all are the same."""
    names = [name for name, version in client.items() if here[name] != version]
    if not names:
        return None
    found = "; ".join(f"{name} {here[name]} here, {client[name]} there" for name in names)
    by_pip = ", or submit with --dependencies pip" if set(names) <= set(BY_PIP) else ""
    return (
        f"the cluster has other versions than the machine that submitted this job: {found} (here is the cluster); "
        f"install the same versions{by_pip}"
    )


def main() -> int:
    if line := what_differs(json.loads(os.environ[VERSIONS]), versions()):
        print(f"erann: {line}")
        return 1
    stop_requested = False

    def request_stop(*_: object) -> None:
        nonlocal stop_requested
        stop_requested = True

    # To stop a job, Ray sends SIGTERM to all of its processes, including the command, which saves a checkpoint.
    signal.signal(signal.SIGTERM, request_stop)
    for start in range(1, _STARTS + 1):
        code = subprocess.Popen([sys.executable, "-m", "jobs.cli.__main__", *sys.argv[1:]]).wait()
        if code >= 0 or stop_requested:
            break
        name, again = signal.Signals(-code).name, f"started again, {start} of {_STARTS - 1} times"
        print(f"erann: the command was killed by {name}; {again if start < _STARTS else 'given up'}", flush=True)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
