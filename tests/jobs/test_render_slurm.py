"""erann cluster render slurm: what its script does with what it was given. Slurm, Ray and Apptainer are stubs here.

On a real Slurm the script runs in tests/cluster/test_slurm.py.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.render.slurm import SlurmJob, render_slurm
from erann_dist.errors import UsageError

# Each notes its words; srun, ray and apptainer go on with the command that is among them.
STUB = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
name, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps([name, *words]) + "\\n")
def go_on(command):
    os.execvp(command[0], command)
if os.environ.get("NOTICE") == name and "stop" not in words:
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(143))
    os.kill(int(os.environ["BATCH"]), signal.SIGUSR1)
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.02)
if name == "srun":
    if "getent" in words:
        print("192.0.2.7       STREAM node-1")
    else:
        go_on(words[words.index("bash"):])
elif name == "ray" and words[0] == "symmetric-run":
    go_on(words[words.index("--") + 1:])
elif name == "apptainer":
    go_on(words[words.index("image.sif") + 1:])
elif name == "erann":
    print("this is erann", flush=True)
    sys.exit(int(os.environ.get("CODE", 0)))
"""
ODD = [
    "a b",
    "$(touch injected)",
    "`touch injected`",
    "'; touch injected; '",
    '"',
    "line\nbreak",
    "*",
    "ü",
    "\\",
    "-x",
    "",
]


def job(**options: Any) -> SlurmJob:
    """One of the defaults."""
    values: dict[str, Any] = {
        "command": ["erann", "pretrain", "audioset.yaml"],
        "name": "erann",
        "nodes": 1,
        "gpus_per_node": "4",
        "time": "24:00:00",
        "notice": 300,
        "requeue": True,
        "partition": None,
        "account": None,
        "modules": [],
        "setup": [],
        "container": None,
        "binds": [],
        "scratch": "/tmp",
    }
    return SlurmJob(**values | options)


@dataclass(frozen=True)
class Outcome:
    code: int
    log: str
    calls: list[list[str]]  # of the stubs

    def of(self, program: str) -> list[list[str]]:
        return [words for name, *words in self.calls if name == program]


def run(folder: Path, asked: SlurmJob, **environment: str) -> Outcome:
    """Run the script in the folder, as Slurm would on the first of the nodes."""
    stubs = folder.parent / f"{folder.name}-stubs"
    stubs.mkdir()
    for name in ("srun", "scontrol", "ray", "apptainer", "erann"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    (folder / "job.sh").write_text(render_slurm(asked))
    number = str(os.getpid())
    environment = {
        "PATH": f"{stubs}:/usr/bin:/bin",
        "NOTES": str(stubs / "notes"),
        "SLURM_JOB_ID": number,
        "SLURM_JOB_NAME": "erann",
        "SLURM_JOB_NUM_NODES": str(asked.nodes),
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURMD_NODENAME": "node-1",
        "SLURM_CPUS_ON_NODE": "8",
        **environment,
    }
    log = folder / f"erann-{number}.log"
    with log.open("a") as file:
        done = subprocess.run(["bash", "job.sh"], cwd=folder, env=environment, stdout=file, stderr=file, timeout=60)
    assert not Path(f"/tmp/erann-{number}").exists()
    notes = (stubs / "notes").read_text() if (stubs / "notes").exists() else ""
    return Outcome(done.returncode, log.read_text(), [json.loads(line) for line in notes.splitlines()])


def test_the_commands_words_arrive_as_they_are(tmp_path: Path) -> None:
    outcome = run(tmp_path, job(command=["erann", *ODD], nodes=2))
    assert outcome.of("erann") == [ODD]
    assert outcome.code == 0
    assert "this is erann\n" in outcome.log  # and not in a node's log
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"erann-{os.getpid()}.log", "job.sh"]
    (ray,) = [words for words in outcome.of("ray") if words[0] == "symmetric-run"]
    options = dict(word.split("=") for word in ray[1 : ray.index("--")])
    address = f"192.0.2.7:{20_000 + os.getpid() % 10_000}"
    assert options == {"--address": address, "--min-nodes": "2", "--num-cpus": "8", "--num-gpus": "4"}


@pytest.mark.parametrize("word", [word for word in ODD if word.isprintable() and word and word[0] != "-"])
def test_modules_and_folders_are_quoted(tmp_path: Path, word: str) -> None:
    asked = job(modules=[word], binds=[word], container="image.sif", setup=["type module > loads"])
    outcome = run(tmp_path, asked, **{"BASH_FUNC_module%%": '() { printf "%s " module "$@" > loaded; }'})
    assert (tmp_path / "loaded").read_text() == f"module load {word} "
    assert not (tmp_path / "injected").exists()
    own = [
        "exec",
        "--nv",
        "--bind",
        str(tmp_path),
        "--bind",
        "/tmp",
        "--bind",
        word,
        "--pwd",
        str(tmp_path),
        "image.sif",
    ]
    calls = outcome.of("apptainer")
    assert [words[: len(own)] for words in calls] == [own, own]
    assert [words[len(own) : len(own) + 2] for words in calls] == [["ray", "stop"], ["ray", "symmetric-run"]]
    assert outcome.of("erann") == [["pretrain", "audioset.yaml"]]


def test_setup_that_fails_ends_the_job(tmp_path: Path) -> None:
    outcome = run(tmp_path, job(setup=["source /nowhere/bin/activate"]))
    assert outcome.code != 0
    assert "/nowhere/bin/activate: No such file" in outcome.log
    assert outcome.calls == []


def test_no_ray(tmp_path: Path) -> None:
    outcome = run(tmp_path, job(setup=["PATH=/usr/bin:/bin"]))
    assert outcome.code == 2
    assert "no ray on node-1: render the job again with what provides it (--module, --setup)" in outcome.log


@pytest.mark.parametrize(
    ("requeue", "notice", "code", "calls", "says"),
    [
        (True, "erann", 0, [["requeue", "NUMBER"]], "not finished: back into the queue"),
        (False, "erann", 143, [], "not finished: sbatch this file again"),
        (True, "ray", 143, [], "before the command has begun: it needs more time"),
    ],
)
def test_notice(tmp_path: Path, requeue: bool, notice: str, code: int, calls: list[list[str]], says: str) -> None:
    outcome = run(tmp_path, job(requeue=requeue, setup=["export BATCH=$$"]), NOTICE=notice)
    assert says in outcome.log
    assert outcome.code == code
    assert outcome.of("scontrol") == [
        [str(os.getpid()) if word == "NUMBER" else word for word in call] for call in calls
    ]


def test_a_failure_is_the_jobs(tmp_path: Path) -> None:
    outcome = run(tmp_path, job(), CODE="3")
    assert outcome.code == 3
    assert outcome.of("scontrol") == []
    assert "ended with exit code 3" in outcome.log


def test_directives() -> None:
    asked = job(
        name="audio-1", partition="gpu,long", account="lab@site", nodes=2, gpus_per_node="a100:4", requeue=False
    )
    lines = render_slurm(asked).splitlines()
    assert lines[0] == "#!/bin/bash"
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert {"job-name=audio-1", "partition=gpu,long", "account=lab@site", "nodes=2", "gpus-per-node=a100:4"} <= {
        *options
    }
    assert {"exclusive", "mem=0", "ntasks-per-node=1", "no-requeue", "signal=B:USR1@300"} <= {*options}
    assert lines.index("#SBATCH --no-requeue") == len(options)  # nothing before them, where sbatch would stop reading


def test_no_gpus() -> None:
    script = render_slurm(job(gpus_per_node="0", container="image.sif"))
    assert "gpus-per-node" not in script
    assert "--nv" not in script


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"command": ["python", "x.py"]}, "'python' is not erann"),
        ({"name": "a\n#SBATCH --uid=0"}, r"--job-name 'a\n#SBATCH --uid=0': not only letters, digits"),
        ({"name": "a b"}, "--job-name 'a b': not only letters"),
        ({"name": "../a"}, "--job-name '../a': not only letters"),
        ({"name": "%j"}, "--job-name '%j': not only letters"),
        ({"partition": "gpu --uid=0"}, "--partition 'gpu --uid=0': not the name"),
        ({"partition": ""}, "--partition '': not the name"),
        ({"account": "a;b"}, "--account 'a;b': not the name"),
        ({"gpus_per_node": "four"}, "--gpus-per-node 'four': not a number or TYPE:NUMBER"),
        ({"gpus_per_node": "a100:4,b:2"}, "--gpus-per-node 'a100:4,b:2': not a number"),
        ({"time": "1 day"}, "--time '1 day': not MINUTES, HH:MM:SS or DAYS-HH:MM:SS"),
        ({"time": "1-2:3:4:5"}, "--time '1-2:3:4:5': not MINUTES"),
        (
            {"time": "9:59"},
            "--time 9:59: too short, as the run stops 300 s before the limit (--notice); give at least 10 min",
        ),
        ({"time": "0"}, "--time 0: too short"),
        ({"scratch": "local"}, "--scratch 'local': not an absolute path"),
        (
            {"scratch": "/scratch/of/the/node1"},
            "--scratch /scratch/of/the/node1: 21 bytes long, but the paths of Ray's",
        ),
        ({"container": "--writable"}, "--container '--writable': not printable, or begins with -"),
        ({"binds": ["/a\n/b"]}, r"--bind '/a\n/b': not printable"),
        ({"modules": ["-h"]}, "--module '-h': not printable, or begins with -"),
    ],
)
def test_refused_in_a_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        render_slurm(job(**options))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("time", ["10", "10:00", "0:10:00", "1-0", "1-00:00", "1-00:00:00"])
def test_times(time: str) -> None:
    assert f"#SBATCH --time={time}\n" in render_slurm(job(time=time))
