"""On a spot instance of EC2: wait for the notice that it is taken back, and tell Ray. `python -m cluster.spot` does so.

The notice comes two minutes before, in the instance's metadata
(https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html). Ray's autoscaler does not
look there. Once Ray knows, the run's workers hear it, save a checkpoint and start again without this node.
"""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

_EVERY_S = 5.0
_MARGIN_S = 10  # before the instance goes, for what is left to do then


def read_notice(metadata: str) -> datetime | None:
    """When the instance will go; None as long as it is to stay. Raises OSError when its metadata can't be read.

    metadata: the service's URL.
    """
    request = Request(
        f"{metadata}/latest/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    )
    with urlopen(request, timeout=5) as answer:
        token = answer.read().decode()
    request = Request(f"{metadata}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token})
    try:
        with urlopen(request, timeout=5) as answer:
            notice = json.load(answer)
    except HTTPError as error:
        if error.code == 404:
            return None
        raise
    return datetime.fromisoformat(notice["time"])


def wait_for_notice(metadata: str) -> datetime:
    while True:
        try:
            if until := read_notice(metadata):
                return until
        except OSError as error:
            print(f"no answer about the instance: {error}", flush=True)
        time.sleep(_EVERY_S)


def leave(seconds: int) -> None:
    """Tell the cluster that this machine's node goes in so many seconds."""
    import ray

    ray.init("auto", log_to_driver=False, logging_level="ERROR")
    node = ray.get_runtime_context().get_node_id()
    ray.shutdown()
    command = [Path(sys.executable).with_name("ray"), "drain-node", "--address", "auto", "--node-id", node]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot instance is taken back"]
    subprocess.run([*command, *reason, "--deadline-remaining-seconds", str(seconds)], check=True)


if __name__ == "__main__":
    until = wait_for_notice(os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254"))
    print(f"this instance goes at {until}", flush=True)
    leave(max(0, round((until - datetime.now(UTC)).total_seconds()) - _MARGIN_S))
