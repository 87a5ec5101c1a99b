"""The command as a user runs it: a process of its own, in a folder of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ERANN = [str(Path(sys.executable).parent / "erann")]


def erann(cwd: Path, *arguments: object, code: int = 0) -> Any:
    """Run the command to its end; its JSON if it was to succeed, else its last line on stderr."""
    command = [*ERANN, *map(str, arguments), *(["--json"] if code == 0 else [])]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if code == 0 else done.stderr.strip().splitlines()[-1]


class Running:
    """A command in a session of its own, as a terminal has it, and all the processes it starts."""

    def __init__(self, cwd: Path, *arguments: object) -> None:
        self.log = (cwd / "log").open("w+")
        self.process = subprocess.Popen(
            [*ERANN, *map(str, arguments)], cwd=cwd, stdout=self.log, stderr=self.log, start_new_session=True
        )
        self.family: dict[int, psutil.Process] = {}

    def wait_for(self, path: Path, seconds: float = 180) -> None:
        self.wait_until(path.exists, str(path), seconds)

    def wait_for_text(self, text: str, seconds: float = 180) -> None:
        """Until it has said so."""
        self.wait_until(lambda: text in self.text(), text, seconds)

    def wait_until(self, is_there: Callable[[], bool], what: str, seconds: float = 180) -> None:
        """Raises AssertionError when the command ends before, or it takes longer."""
        deadline = time.monotonic() + seconds
        while not is_there():
            assert time.monotonic() < deadline, f"no {what}: {self.text()}"
            assert self.process.poll() is None, self.text()
            self._watch()
            time.sleep(0.2)
        self._watch()

    def _watch(self) -> None:
        for child in psutil.Process(self.process.pid).children(recursive=True):
            self.family[child.pid] = child

    def end(self, how: signal.Signals) -> int:
        """Send the signal, to the whole foreground group if it is Ctrl-C; the exit code."""
        if how == signal.SIGINT:
            os.killpg(self.process.pid, how)
        else:
            self.process.send_signal(how)
        return self.process.wait(timeout=120)

    def text(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()

    def survivors(self, agents: bool = True) -> list[str]:
        """What is still running of all that the command ever started, after a grace period.

        After SIGKILL the workers are gone at once; Ray's two agents on a node notice it within some 65 s.
        agents: whether they count.
        """
        processes = [each for each in self.family.values() if agents or not _is_agent(each)]
        _, alive = psutil.wait_procs(processes, timeout=150)
        return [" ".join(process.cmdline()) for process in alive if process.is_running()]


def _is_agent(process: psutil.Process) -> bool:
    with suppress(psutil.Error):  # it has ended
        return process.cmdline()[:1] in (["ray::DashboardAgent"], ["ray::RuntimeEnvAgent"])
    return False
