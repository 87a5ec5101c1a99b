"""The Dockerfile, as far as it can be checked without Docker; hadolint's rules that matter by tests of their own."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from docker.utils.build import exclude_paths  # Docker's own reading of .dockerignore

from cluster.submit.package import make_package

ROOT = Path(__file__).parents[3]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, lines joined and comments left away."""
    lines = (ROOT / "cluster" / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if line.strip() and not line.startswith("#")).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1].strip()) for line in text.splitlines()]


def arguments(name: str) -> list[str]:
    return [argument for instruction, argument in instructions() if instruction == name]


def context(root: Path) -> list[str]:
    """The files that `docker build` sends."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    return sorted(path for path in exclude_paths(str(root), patterns) if (root / path).is_file())


def test_the_base_is_pinned_and_fits_torchs_cuda() -> None:
    (argument,), base = arguments("ARG"), arguments("FROM")
    assert base == ["${BASE}"]
    match = re.fullmatch(r"BASE=nvidia/cuda:(\d+)\.(\d+)\.\d+-base-ubuntu24.04", argument)  # whose Python is 3.12
    assert match
    import torch

    # Within a major version the libraries in torch's wheels run with any driver that the base asks for. A wheel without
    # CUDA, as some machines have for tests, needs none.
    if torch.version.cuda:
        major, minor = map(int, torch.version.cuda.split("."))
        assert (int(match[1]), int(match[2])) <= (major, minor) < (int(match[1]) + 1, 0)


def test_it_runs_as_a_user_that_kubernetes_knows_not_to_be_root() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", arguments("USER")[-1])
    last_user = max(i for i, (name, _) in enumerate(instructions()) if name == "USER")
    assert not [name for name, _ in instructions()[last_user:] if name in ("RUN", "COPY", "ADD")]


def test_hadolints_rules() -> None:
    names = [name for name, _ in instructions()]
    assert "ADD" not in names  # DL3020
    assert all(path.startswith("/") for path in arguments("WORKDIR"))  # DL3000
    assert names.count("CMD") == 1  # DL4003
    assert arguments("CMD")[0].startswith("[")  # DL3025
    for command in arguments("RUN"):
        assert "sudo" not in command.split()  # DL3004
        if "apt-get install" in command:
            assert "--no-install-recommends" in command  # DL3015
            assert "--yes" in command  # DL3014
            assert command.startswith("apt-get update")
            assert command.endswith("rm -rf /var/lib/apt/lists/*")  # DL3009
        for install in re.findall(r"pip install [^&]*", command):
            assert "--no-cache" in install  # DL3042
    assert any("pipefail" in shell for shell in arguments("SHELL"))  # DL4006


def test_what_ray_and_kubernetes_need_is_in_it() -> None:
    packages = re.search(r"apt-get install (.*?) &&", " ".join(arguments("RUN")))
    assert packages
    assert {"wget", "rsync", "openssh-client", "ca-certificates"} <= set(packages[1].split())
    environment = dict(pair.split("=", 1) for pair in " ".join(arguments("ENV")).split())
    assert environment["PATH"].startswith("/opt/erann/bin:")  # where pip puts ray and erann
    assert environment["HOME"] == arguments("WORKDIR")[-1]  # Ray asks the image's variables for it


def test_it_installs_from_the_lock() -> None:
    """Each installation but that of the program itself is of a lock file with hashes (tests/test_lock.py)."""
    installs = [each for command in arguments("RUN") for each in re.findall(r"pip install [^&]*", command)]
    *locked, program = installs
    assert [re.findall(r"--requirement (\S+)", each) for each in locked] == [
        ["requirements/setup.txt"],
        ["requirements/image.txt"],
    ]
    assert all("--require-hashes" in each and "--no-deps" in each for each in locked)
    assert "--no-deps" in program
    assert "--no-build-isolation" in program


def test_what_is_copied_is_in_the_context() -> None:
    sent = context(ROOT)
    for copy in arguments("COPY"):
        *sources, _ = copy.split()
        for source in sources:
            assert source in sent or any(path.startswith(f"{source}/") for path in sent), source


def test_nothing_else_is_sent(tmp_path: Path) -> None:
    """No data, history or secret: only what is named."""
    for path in [".env", ".git/config", "data/a.tar", "runs/x", ".venv/bin/python", "id_rsa", "jobs/__pycache__/a.pyc"]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "jobs" / "cli").mkdir()
    (tmp_path / "jobs" / "cli" / "__main__.py").touch()
    assert context(tmp_path) == ["jobs/cli/__main__.py"]


def test_the_copied_files_make_the_whole_program(tmp_path: Path) -> None:
    """A wheel of nothing but what is sent has every module, recipe and template."""
    source = tmp_path / "source"
    for path in context(ROOT):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("erann_dist-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(ROOT))
        for package in ("erann_dist", "shards", "cluster", "jobs")
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".yaml", ".csv", ".sh", ".typed", ".html", ".css", ".js")
    }
    assert packed == expected


def test_a_submitted_jobs_package_is_the_whole_program() -> None:
    expected = {
        str(path.relative_to(ROOT))
        for folder in ("erann_dist", "shards", "cluster", "jobs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name not in ("py.typed", "Dockerfile")
    }
    assert make_package({}).source.keys() == expected
