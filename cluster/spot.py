"""`python -m cluster.spot`, on an EC2 spot instance: waits for the interruption notice and drains the node in Ray.

The notice appears in the instance's metadata two minutes ahead
(https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html). Ray's autoscaler does not
check it. Once Ray knows, the run's workers are notified, save a checkpoint, and restart without this node.
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
_MARGIN_S = 10  # The node is drained this long before the instance ends.


def read_notice(metadata: str) -> datetime | None:
    """When the instance will be interrupted; None if it won't. Raises OSError if the metadata can't be read.

    metadata: URL of the metadata service.
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
            print(f"instance metadata can't be read: {error}", flush=True)
        time.sleep(_EVERY_S)


def leave(seconds: int) -> None:
    """Drain this machine's node, with a deadline in this many seconds."""
    import ray

    ray.init("auto", log_to_driver=False, logging_level="ERROR")
    node = ray.get_runtime_context().get_node_id()
    ray.shutdown()
    command = [Path(sys.executable).with_name("ray"), "drain-node", "--address", "auto", "--node-id", node]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot instance interruption"]
    subprocess.run([*command, *reason, "--deadline-remaining-seconds", str(seconds)], check=True)


if __name__ == "__main__":
    until = wait_for_notice(os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254"))
    print(f"this instance will be interrupted at {until}", flush=True)
    leave(max(0, round((until - datetime.now(UTC)).total_seconds()) - _MARGIN_S))
