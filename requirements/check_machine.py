"""Are the lock files for this machine and this Python? `make setup` runs this first, with whatever Python there is."""

import platform
import sys

OLDEST, NEWEST = (3, 11), (3, 14)  # of CPython; Ray has no wheels for a newer one

version = sys.version_info[:2]
name = platform.python_implementation()
if not OLDEST <= version <= NEWEST or name != "CPython":
    sys.exit(
        f"erann-dist needs CPython {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}, this is {name} "
        f"{version[0]}.{version[1]}; name another: make setup PYTHON=python3.12"
    )
if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    sys.exit(
        f"the lock files are for Linux on x86-64, this is {platform.system()} on {platform.machine()}; without them: "
        "pip install --editable '.[dev]'"
    )
