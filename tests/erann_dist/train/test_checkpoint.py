"""Checkpoints: what is committed is whole, what is damaged is named, who was replaced writes nothing that counts."""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest
import safetensors.torch
import torch

from erann_dist.errors import UserError
from erann_dist.log.events import CheckpointSaved, Event, Incident
from erann_dist.recipe import CheckpointSection
from erann_dist.storage.folder import LocalFolder
from erann_dist.train import checkpoint
from erann_dist.train.async_checkpoint import CheckpointWriter
from erann_dist.train.checkpoint import Facts, Start, Superseded


@pytest.fixture
def run(tmp_path: Path) -> LocalFolder:
    return LocalFolder(str(tmp_path / "run"))


@pytest.fixture
def start(run: LocalFolder) -> Start:
    return checkpoint.begin(run)


def facts_of(step: int) -> Facts:
    return Facts(step, "recipe", "data", "ERANN-0-1", 1, ["bad"], [3], {"torch": "x"})


def always(_: int) -> bool:
    return True


def save(start: Start, step: int, keep_last: int = 9, keep_best: int = 0) -> str:
    state = {"model.w": torch.full((2, 3), float(step))}
    name = checkpoint.save(start, facts_of(step), state)
    checkpoint.delete_others(start, name, always, keep_last, keep_best)
    return name


def steps(run: LocalFolder) -> list[int]:
    return [int(name.split("-")[1]) for name in checkpoint.committed(run)]


def test_what_was_saved_is_loaded(run: LocalFolder, start: Start) -> None:
    name = save(start, 7)
    assert name == "checkpoints/step-00000007-0001"
    assert checkpoint.latest(run) == (name, [])
    facts, state = checkpoint.load(run, name)
    assert facts == facts_of(7)
    assert torch.equal(state["model.w"], torch.full((2, 3), 7.0))


def test_the_same_state_gives_the_same_bytes(run: LocalFolder, start: Start, tmp_path: Path) -> None:
    other = LocalFolder(str(tmp_path / "other"))
    name = save(start, 7)
    assert name == save(checkpoint.begin(other), 7)
    for file in ("state.safetensors", "state.json", "COMMITTED"):
        assert run.read(f"{name}/{file}") == other.read(f"{name}/{file}")


def test_what_is_written_is_what_safetensors_writes(run: LocalFolder, start: Start) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        "model.b": torch.randn(3, 5, generator=generator),
        'model.été "quoted"': torch.randn(7, generator=generator),
        "model.a.num_batches_tracked": torch.tensor(2**40),
        "adam.step": torch.tensor(3.0),
        "exp_avg.turned": torch.randn(4, 6, generator=generator).t(),
        "exp_avg.none": torch.zeros(0, 2),
    }
    whole = {name: value.contiguous() for name, value in state.items()}
    for number in range(len(state) + 1):  # names of all lengths, for the header is padded
        some = dict(list(state.items())[:number])
        expected = safetensors.torch.save({name: whole[name] for name in some})
        assert b"".join(checkpoint.serialised(some)) == expected


def test_keeps_the_last_ones(run: LocalFolder, start: Start) -> None:
    for step in (5, 10, 100):
        save(start, step, keep_last=2)
    assert steps(run) == [10, 100]
    # A run that went back behind a damaged checkpoint replaces it.
    again = checkpoint.begin(run)
    save(again, 20, keep_last=2)
    assert steps(run) == [10, 20]
    save(again, 5, keep_last=1)
    assert steps(run) == [5]
    assert {path.name for path in Path(run.url, "checkpoints").iterdir()} == {"step-00000005-0002"}


def test_what_was_saved_on_a_notice_is_not_counted(run: LocalFolder, start: Start) -> None:
    """It is kept for as long as it is the newest, and takes no other's place."""
    for step in (2, 4, 5):
        name = save(start, step)
        checkpoint.delete_others(start, name, lambda step: step % 2 == 0, keep_last=2, keep_best=0)
    assert steps(run) == [2, 4, 5]
    name = save(checkpoint.begin(run), 6)
    checkpoint.delete_others(checkpoint.begin(run), name, lambda step: step % 2 == 0, keep_last=2, keep_best=0)
    assert steps(run) == [4, 6]


def test_of_two_checkpoints_of_one_step_the_later_starts_counts() -> None:
    names = [f"checkpoints/step-{step:08d}-{number:04d}" for step, number in ((2, 1), (4, 1), (4, 2), (5, 2), (6, 2))]
    assert checkpoint.regular(names, lambda step: step % 2 == 0) == [names[0], names[2], names[4]]


def test_what_else_lies_in_the_folders_is_left_alone(run: LocalFolder, start: Start) -> None:
    """As a copy that somebody keeps, or a note."""
    kept = save(start, 1)
    shutil.copytree(Path(run.url, kept), Path(run.url, f"{kept}-keep"))
    others = ("checkpoints/notes.txt", "checkpoints/step-best/COMMITTED", "starts/.nfs0001", "starts/notes")
    for name in others:
        run.write(name, b"mine")
    again = checkpoint.begin(run)
    newest = save(again, 2, keep_last=1)
    assert checkpoint.latest(run) == (newest, [])
    assert steps(run) == [2]
    assert all(run.read(name) == b"mine" for name in others)
    assert run.exists(f"{kept}-keep/state.safetensors")


def test_a_new_start_removes_what_killed_writers_left(run: LocalFolder, start: Start) -> None:
    save(start, 1)
    left = Path(run.url, "checkpoints/step-00000002-0001/state.safetensors.0123456789abcdef.part")
    left.parent.mkdir()
    left.write_bytes(b"half")
    checkpoint.begin(run)
    assert not left.parent.exists()
    assert steps(run) == [1]


def test_another_versions_checkpoint_is_an_error(run: LocalFolder, start: Start) -> None:
    name = save(start, 1)
    facts = json.dumps(json.loads(run.read(f"{name}/state.json")) | {"another": 1}).encode()
    run.write(f"{name}/state.json", facts)
    marker = json.loads(run.read(f"{name}/COMMITTED")) | {"state.json": hashlib.sha256(facts).hexdigest()}
    run.write(f"{name}/COMMITTED", json.dumps(marker).encode())
    with pytest.raises(UserError, match=f"{name}: not a checkpoint of this version of the program .*another"):
        checkpoint.load(run, name)


def test_keeps_the_best_ones_besides(run: LocalFolder, start: Start) -> None:
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.9), (5, None)):
        name = save(start, step, keep_last=1, keep_best=2)
        if accuracy is not None:
            checkpoint.record(start, name, {"accuracy": accuracy, "loss": 9.0})
    assert steps(run) == [2, 4, 5]
    assert [name[-7:] for name in checkpoint.best(run, checkpoint.committed(run))[0]] == ["02-0001", "04-0001"]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "COMMITTED"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    run: LocalFolder, start: Start, file: str, damage: str
) -> None:
    first, second = save(start, 1), save(start, 2)
    path = Path(run.url, second, file)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    contents = {"cut": bytes(data[:-3]), "flipped": bytes(data), "empty": b""}
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(contents[damage])
    found, problems = checkpoint.latest(run)
    assert found == first
    (problem,) = problems
    assert problem.startswith(f"{run}/{second}: ")
    assert file in problem or damage == "gone"
    assert problem.endswith("the checkpoint before it is used")
    with pytest.raises(UserError, match="step-00000002-0001: "):
        checkpoint.load(run, second)


def test_a_first_checkpoint_that_was_not_finished_is_none(run: LocalFolder, start: Start) -> None:
    part = "checkpoints/step-00000001-0001"
    run.write(f"{part}/state.safetensors", b"half")
    assert checkpoint.latest(run) == (None, [f"{run}/{part}: it was not completely written; there is none before it"])


def test_no_whole_checkpoint_is_an_error(run: LocalFolder, start: Start) -> None:
    assert checkpoint.latest(run) == (None, [])
    name = save(start, 1)
    Path(run.url, name, "state.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}: damaged, and no other checkpoint is intact"):
        checkpoint.latest(run)


def test_a_file_that_is_missing_before_the_marker_does_not_count(run: LocalFolder, start: Start) -> None:
    """As a kill leaves it at any moment: files first, the marker last."""
    name = save(start, 1)
    whole = {file: run.read(f"{name}/{file}") for file in ("state.safetensors", "state.json", "COMMITTED")}
    for number in range(3):
        late = checkpoint.begin(run)
        part = f"checkpoints/step-00000002-{late.number:04d}"
        for file in list(whole)[:number]:
            run.write(f"{part}/{file}", whole[file])
        found, problems = checkpoint.latest(run)
        assert found == name
        assert problems == [
            f"{run}/checkpoints/step-00000002-{each:04d}: it was not completely written; "
            "the checkpoint before it is used"
            for each in range(late.number, 2, -1)
        ]
    save(late, 3, keep_last=1)  # and what lay about is gone
    assert len(list(Path(run.url, "checkpoints").iterdir())) == 1


def test_a_start_that_was_replaced_writes_no_more(run: LocalFolder, start: Start) -> None:
    save(start, 1)
    later = checkpoint.begin(run)
    assert (start.number, later.number) == (1, 2)
    with pytest.raises(Superseded, match="this run was started again"):
        save(start, 2)
    assert steps(run) == [1]
    save(later, 2)
    with pytest.raises(Superseded):
        checkpoint.record(start, "checkpoints/step-00000001-0001", {"mAP": 1.0})


class CutOff(LocalFolder):
    """A folder whose writer is held up before one file, while the world goes on."""

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        if name.endswith(HOLDS["before"]):
            HOLDS["held"]()
        with super().writing(name) as file:
            yield file


HOLDS: dict[str, object] = {}


@pytest.mark.parametrize("before", ["state.safetensors", "state.json", "COMMITTED"])
def test_a_writer_that_was_cut_off_comes_too_late_to_do_harm(run: LocalFolder, start: Start, before: str) -> None:
    """While it stands still, the next start goes on, saves more steps and deletes what is old."""
    save(start, 1)

    def next_start() -> None:
        HOLDS["before"] = "nothing"
        later = checkpoint.begin(run)
        for step in (2, 3, 4):
            save(later, step, keep_last=2)

    HOLDS.update(before=before, held=next_start)
    cut_off = Start(CutOff(run.url), start.name)
    with pytest.raises(Superseded):
        save(cut_off, 2, keep_last=1)
    # Behind its last look what it commits is whole, and its own.
    assert ("checkpoints/step-00000002-0001" in checkpoint.committed(run)) == (before == "COMMITTED")
    assert {3, 4} <= set(steps(run))
    name, problems = checkpoint.latest(run)
    assert (name, problems) == ("checkpoints/step-00000004-0002", [])
    assert torch.equal(checkpoint.load(run, name)[1]["model.w"], torch.full((2, 3), 4.0))


def in_background(start: Start, **settings: int) -> CheckpointWriter:
    saver = CheckpointWriter(start, CheckpointSection(**settings), always)
    saver.state["model.w"] = torch.zeros(2, 3)
    return saver


def finish(saver: CheckpointWriter) -> list[Event]:
    assert saver.is_done(60.0)
    return saver.drain()


def test_saves_in_the_background(run: LocalFolder, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    save_now: Callable[..., str] = checkpoint.save

    def slow_save(*arguments: object) -> str:
        assert go_on.wait(60)
        return save_now(*arguments)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    saver = in_background(start)
    saver.begin(facts_of(5), stall_s=0.25)
    assert not saver.is_done(0.0)
    assert saver.drain() == []
    assert steps(run) == []
    go_on.set()
    (event,) = finish(saver)
    assert isinstance(event, CheckpointSaved)
    assert (event.step, event.stall_s, event.path) == (5, 0.25, f"{run}/checkpoints/step-00000005-0001")
    assert (saver.saved_step, saver.last) == (5, "checkpoints/step-00000005-0001")
    assert event.seconds > 0
    assert steps(run) == [5]
    assert finish(saver) == []
    saver.close()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A disk that is full for so many files: change `left`."""
    faults = {"left": 0}
    write = LocalFolder.write

    def fail(self: LocalFolder, name: str, data: bytes) -> None:
        if faults["left"]:
            faults["left"] -= 1
            raise OSError(28, "No space left on device", name)
        write(self, name, data)

    monkeypatch.setattr(LocalFolder, "write", fail)
    monkeypatch.setattr("erann_dist.train.async_checkpoint._PAUSES_S", (0.0,))
    return faults


def test_a_failed_checkpoint_is_told_and_the_next_one_tried(
    run: LocalFolder, start: Start, full_disk: dict[str, int]
) -> None:
    saver = in_background(start, max_failed=2)
    for step, full in ((1, False), (2, True), (3, True), (4, False), (5, True), (6, True)):
        full_disk["left"] = int(full)
        saver.begin(facts_of(step), 0.0)
        (event,) = finish(saver)
        assert saver.has_failed == full
        if full:
            assert event == Incident(
                step,
                "checkpoint",
                f"{run}: the checkpoint of step {step} could not be written (No space left on device); "
                "the next one is tried",
            )
        else:
            assert isinstance(event, CheckpointSaved)
    full_disk["left"] = 1
    saver.begin(facts_of(7), 0.0)
    with pytest.raises(UserError, match=r"No space left on device\); 3 in a row, checkpoint.max_failed is 2"):
        finish(saver)
    assert steps(run) == [1, 4]
    saver.close()


def test_a_checkpoint_that_failed_can_be_tried_again(start: Start, full_disk: dict[str, int]) -> None:
    saver = in_background(start, max_failed=3)
    full_disk["left"] = 2
    saver.begin(facts_of(9), 0.0)
    events = finish(saver)
    while saver.has_failed:
        saver.begin_again()
        events += finish(saver)
    assert [type(event) for event in events] == [Incident, Incident, CheckpointSaved]
    saver.close()


def test_old_ones_that_can_not_be_deleted_are_told(
    run: LocalFolder, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one is committed all the same."""

    def refuse(self: LocalFolder, name: str) -> None:
        raise UserError(f"{name}: access denied")

    saver = in_background(start, keep_last=1)
    for step in (1, 2):
        saver.begin(facts_of(step), 0.0)
        events = finish(saver)
        monkeypatch.setattr(LocalFolder, "delete", refuse)
    saved, incident = events
    assert isinstance(saved, CheckpointSaved)
    assert "old checkpoints could not be deleted (checkpoints/step-00000001-0001/COMMITTED: access" in incident.text
    assert steps(run) == [1, 2]
    saver.close()


def test_a_damaged_record_of_an_evaluation_is_an_incident(run: LocalFolder, start: Start) -> None:
    saver = CheckpointWriter(start, CheckpointSection(keep_last=3, keep_best=1), always)
    for step in (1, 2, 3):
        saver.begin(facts_of(step), 0.0)
        events = finish(saver)
        if step == 1:
            run.write("checkpoints/step-00000001-0001/metrics.json", b'{"mAP": "good"}')
        told = [event.text for event in events if isinstance(event, Incident)]
        assert len(told) == (step == 2)  # once, though it is found each time
        assert all("step-00000001-0001/metrics.json: damaged (mAP" in text for text in told)


def test_an_evaluation_is_written_beside_its_checkpoint(
    run: LocalFolder, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = in_background(start)
    assert saver.record(3, {"mAP": 0.5}) == []
    saver.begin(facts_of(4), 0.0)
    finish(saver)
    assert saver.record(3, {"mAP": 0.5}) == []
    assert checkpoint.best(run, checkpoint.committed(run))[0] == []
    assert saver.record(4, {"mAP": 0.5}) == []
    assert checkpoint.best(run, checkpoint.committed(run))[0] == ["checkpoints/step-00000004-0001"]
    run.write("checkpoints/step-00000004-0001/metrics.json", b"{}")
    assert checkpoint.best(run, checkpoint.committed(run)) == ([], [])

    def refuse(self: LocalFolder, name: str, data: bytes) -> None:
        raise UserError("S3 is away")

    monkeypatch.setattr(LocalFolder, "write", refuse)
    (incident,) = saver.record(4, {"mAP": 0.5})
    assert "the evaluation of step 4 could not be written next to its checkpoint (S3 is away)" in incident.text
    saver.close()


def test_a_replaced_start_is_told(run: LocalFolder, start: Start) -> None:
    saver = in_background(start)
    checkpoint.begin(run)
    saver.begin(facts_of(1), 0.0)
    with pytest.raises(Superseded):
        finish(saver)
    saver.close()


def test_a_checkpoint_holds_no_code(run: LocalFolder, start: Start) -> None:
    name = save(start, 1)
    files = {path.name for path in Path(run.url, name).iterdir()}
    assert files == {"state.safetensors", "state.json", "COMMITTED"}
    json.loads(run.read(f"{name}/state.json"))
    header = run.read(f"{name}/state.safetensors")
    json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
