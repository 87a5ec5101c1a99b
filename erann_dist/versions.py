"""Which versions of the libraries are installed, and whether torch and torchaudio can work together.

torchaudio's wheels declare only `torch>=2.11`; with an incompatible pair the first module that imports it fails ("Could
not load this library"). Which pairs work was found by trying each pair of releases on Linux x86-64.
"""

import importlib
import importlib.metadata
import platform
import re
from types import ModuleType

from erann_dist.errors import UserError

PROGRAM = "erann-dist"
# Results and checkpoints depend on these; all nodes of a run need the same ones.
LIBRARIES = ("torch", "torchaudio", "ray", "deepspeed")

# torchaudio's release: the oldest and the newest release of torch (major, minor) that it loads with.
# 2.11.0 refuses torch 2.15, whose wheels are built for another CUDA version; 2.11.1 needs a symbol new in torch 2.13.
_TORCH_FOR = {"2.11.0": ((2, 11), (2, 14)), "2.11.1": ((2, 13), (2, 15))}


def installed(name: str) -> str | None:
    """A package's installed version without its local part (2.11.0 of 2.11.0+cu130), or None."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def program_versions() -> dict[str, str]:
    """Versions of Python, this program and the libraries, with local parts, as a run's log and `--version` show."""
    found = {"Python": platform.python_version()}
    for name in (PROGRAM, *LIBRARIES):
        if installed(name):
            found[name] = importlib.metadata.version(name)
    return found


def pinned_requirements() -> list[str]:
    """This program's requirements, each at the version installed here: torch==2.15.0, ray[default,train]==2.60.0, …

    Without local parts, which package indexes do not have.
    """
    pins = []
    for requirement in importlib.metadata.requires(PROGRAM) or []:
        name = re.match(r"([\w.-]+)(\[[\w,.-]+\])?", requirement)
        if name and "extra ==" not in requirement:
            pins.append(f"{name[0]}=={installed(name[1])}")
    return pins


def check_torchaudio() -> None:
    """Raise UserError where the installed releases of torch and torchaudio are known not to work together.

    Reads only the packages' metadata, which takes a few milliseconds.
    """
    torch, torchaudio = installed("torch"), installed("torchaudio")
    if torch is None or torchaudio not in _TORCH_FOR:
        return
    major, minor = (int(part) for part in torch.split(".")[:2])
    oldest, newest = _TORCH_FOR[torchaudio]
    if not oldest <= (major, minor) <= newest:
        raise UserError(_incompatible(torch, torchaudio))


def import_torchaudio() -> ModuleType:
    """The torchaudio module. Raises UserError, with the versions that work, where it does not load."""
    check_torchaudio()
    try:
        return importlib.import_module("torchaudio")
    except (ImportError, OSError, RuntimeError) as error:  # OSError: a library that does not load; RuntimeError: CUDA
        torch, torchaudio = installed("torch"), installed("torchaudio")
        raise UserError(f"{_incompatible(torch, torchaudio)} ({str(error).splitlines()[0]})") from error


def _incompatible(torch: str | None, torchaudio: str | None) -> str:
    fits = "; ".join(
        f"torchaudio=={release} with torch {_text(oldest)} to {_text(newest)}"
        for release, (oldest, newest) in _TORCH_FOR.items()
    )
    return f"torch {torch} and torchaudio {torchaudio} do not work together; install a pair that does: {fits}"


def _text(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
