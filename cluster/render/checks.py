"""Checks of option values, by the rules of the system that will read them."""

import re

from erann_dist.errors import UsageError


def require(option: str, value: str, pattern: str, what: str) -> None:
    """Raise UsageError unless the pattern matches the whole value."""
    if not re.fullmatch(pattern, value, re.ASCII):
        raise UsageError(f"{option} {value!r}: not {what}")


def require_pinned(image: str) -> None:
    """Raise UsageError unless this is a container image with a fixed tag or digest, so that all nodes get the same."""
    require("--image", image, r"[a-z0-9][\w.:/-]*(@sha256:[0-9a-f]{64})?", "the name of a container image")
    tag = image.rpartition("/")[2].partition(":")[2]
    if not tag or tag == "latest":
        raise UsageError(f"--image {image}: has no fixed tag, so nodes may differ; give a tag or a digest")
