"""The demo is the product's first impression: it must run as it is, and the model must have learnt."""

import json
import subprocess
import sys
from pathlib import Path


def test_demo(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "erann"), "demo", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    train, evaluation = result["packed"].values()
    assert train["not_packed"] == {"missing": 1, "unreadable": 1}
    assert (train["clips"], evaluation["clips"], evaluation["not_packed"]) == (398, 160, {})
    assert result["mAP"] >= 0.80
    assert result["chance_mAP"] < 0.25
    assert len(result["tags"]) == 5
    again = subprocess.run(command[:-1], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert f"mAP {result['mAP']:.3f}" in again.stdout
