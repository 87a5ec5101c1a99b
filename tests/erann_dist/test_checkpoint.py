from pathlib import Path

import pytest
import torch

from erann_dist import checkpoint
from erann_dist.checkpoint import Facts
from erann_dist.errors import UserError


def save(folder: Path, step: int, keep_last: int = 9) -> Path:
    facts = Facts(step, "recipe", "data", "ERANN-0-1", 1, ["bad"], {"torch": "x"})
    return checkpoint.save(folder, facts, {"model.w": torch.full((2, 3), float(step))}, keep_last)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert checkpoint.latest(tmp_path) == path
    assert checkpoint.load_facts(path).step == 7
    assert torch.equal(checkpoint.load_state(path, {"model.w": torch.zeros(2, 3)})["model.w"], torch.full((2, 3), 7.0))


def test_keeps_the_last_ones(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        save(tmp_path, step, keep_last=2)
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["step-00000010", "step-00000100"]
    # A run that went back behind a damaged checkpoint replaces it.
    save(tmp_path, 20, keep_last=2)
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["step-00000010", "step-00000020"]
    save(tmp_path, 5, keep_last=1)
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["step-00000005"]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "COMMITTED"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_does_not_count(tmp_path: Path, file: str, damage: str) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    data = bytearray((bad / file).read_bytes())
    if damage == "cut":
        (bad / file).write_bytes(data[:-3])
    elif damage == "flipped":
        data[len(data) // 2] ^= 4
        (bad / file).write_bytes(data)
    else:
        (bad / file).unlink()
    assert checkpoint.latest(tmp_path) == good
    (good / "state.safetensors").write_bytes(b"")
    if file == "COMMITTED" and damage == "gone":
        bad.rename(tmp_path / "gone")
    with pytest.raises(UserError, match="damaged, and no other checkpoint is whole"):
        checkpoint.latest(tmp_path)


def test_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None


def test_other_shapes_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(UserError, match=r"model\.w is \(2, 3\) in the file, \(3, 2\) in the model"):
        checkpoint.load_state(path, {"model.w": torch.zeros(3, 2)})
    with pytest.raises(UserError, match=r"model\.v is missing in the file, \(1,\) in the model"):
        checkpoint.load_state(path, {"model.w": torch.zeros(2, 3), "model.v": torch.zeros(1)})
