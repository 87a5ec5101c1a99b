"""The versions that this program runs with here, for the nodes to have the same."""

import re
from importlib.metadata import requires, version

_PROGRAM = "erann-dist"


def ray_version() -> str:
    return version("ray")


def pinned_requirements() -> list[str]:
    """What the program requires, each in the version that is installed here: torch==2.11.0, ray[default,train]==…

    The last part of a version such as 2.11.0+cu130 names a build; it is left away, for package indexes don't have it.
    """
    pins = []
    for requirement in requires(_PROGRAM) or []:
        name = re.match(r"([\w.-]+)(\[[\w,.-]+\])?", requirement)
        if name and "extra ==" not in requirement:
            pins.append(f"{name[0]}=={version(name[1]).split('+')[0]}")
    return pins
