"""A submitted job's first process, on the cluster's head: `python -m cluster.submit.driver pretrain audioset.yaml …`.

It runs the `erann` command, if the cluster has the versions that the job was sent from, and again when the command was
killed, as for want of memory: it then goes on from its last checkpoint.
"""

import json
import os
import signal
import subprocess
import sys

from cluster.submit.package import BY_PIP, versions

VERSIONS = "ERANN_VERSIONS"  # in the job's environment: those of the client, as JSON
_STARTS = 4


def what_differs(client: dict[str, str], here: dict[str, str]) -> str | None:
    """A line about what client and cluster do not have alike, and its mend."""
    names = [name for name, version in client.items() if here[name] != version]
    if not names:
        return None
    found = "; ".join(f"{name} {here[name]} here, {client[name]} there" for name in names)
    by_pip = ", or submit with --dependencies pip" if set(names) <= set(BY_PIP) else ""
    return (
        f"the cluster has other versions than the machine that sent this job: {found} (here is the cluster); "
        f"install the same ones{by_pip}"
    )


def main() -> int:
    if line := what_differs(json.loads(os.environ[VERSIONS]), versions()):
        print(f"erann: {line}")
        return 1
    told_to_stop = False

    def note(*_: object) -> None:
        nonlocal told_to_stop
        told_to_stop = True

    # Ray's stop sends SIGTERM to every process of the job, so to the command too, which saves what it has.
    signal.signal(signal.SIGTERM, note)
    for start in range(1, _STARTS + 1):
        code = subprocess.Popen([sys.executable, "-m", "jobs.cli.__main__", *sys.argv[1:]]).wait()
        if code >= 0 or told_to_stop:
            break
        name, again = signal.Signals(-code).name, f"started again, {start} of {_STARTS - 1} times"
        print(f"erann: the command was killed by {name}; {again if start < _STARTS else 'given up'}", flush=True)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
