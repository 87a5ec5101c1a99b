"""How a start of a run begins: it claims the run's folder and loads the last checkpoint."""

import socket
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from erann_dist.errors import UserError
from erann_dist.train import checkpoint
from erann_dist.train.async_checkpoint import CheckpointWriter
from erann_dist.train.engine import Engine
from erann_dist.train.run import Run
from erann_dist.versions import program_versions


@dataclass(frozen=True)
class Progress:
    """How far the run is, according to its checkpoint."""

    step: int = 0
    bad_clips: list[str] = field(default_factory=list)  # keys
    bad_steps: list[int] = field(default_factory=list)


def claim(run: Run, resources: ExitStack) -> tuple[CheckpointWriter | None, str | None, list[str]]:
    """Take over the run's folder before anything is read there, since an earlier start still running could delete it.

    Returns the writer of its checkpoints, on rank 0; the newest checkpoint's name, if there is one; and a line for each
    damaged checkpoint. Raises UserError.
    """
    writer, found = None, None
    if run.workers.is_rank_zero:
        try:
            start = checkpoint.begin(run.folder)
        except OSError as error:
            raise UserError(
                f"{run.folder}: {socket.gethostname()} can't write there ({error.strerror}); run.dir is a folder "
                "that all hosts share, or s3://bucket/prefix"
            ) from error
        writer = CheckpointWriter(start, run.recipe.checkpoint, run.is_checkpoint_due)
        resources.enter_context(closing(writer))
        found = checkpoint.latest(run.folder)
    name, damaged = run.workers.broadcast(found) or (None, [])
    return writer, name, damaged


def load(run: Run, name: str, engine: Engine) -> Progress:
    """Load a checkpoint into the engine and its model.

    Raises UserError when it is of another recipe, other clips or another model.
    """
    path = f"{run.folder}/{name}"
    facts, state = checkpoint.load(run.folder, name)
    if facts.train_hash != run.clips.info.content_hash:
        raise UserError(f"{path}: made with other training clips than {run.recipe.data.train[0].url} now contains")
    if facts.recipe_hash != run.recipe.hash():
        raise UserError(f"{path}: made with another recipe; give this one another run.name")
    weights = {key: value for key, value in state.items() if key.startswith("model.")}
    checkpoint.require_shapes(path, weights, {f"model.{k}": v for k, v in engine.model.state_dict().items()})
    engine.load_state(state)
    return Progress(facts.step, list(facts.bad_clips), list(facts.bad_steps))


def facts(run: Run, progress: Progress) -> checkpoint.Facts:
    """What a checkpoint records about the run."""
    return checkpoint.Facts(
        step=progress.step,
        recipe_hash=run.recipe.hash(),
        train_hash=run.clips.info.content_hash,
        variant=run.recipe.model.variant,
        threads=run.recipe.run.threads,
        bad_clips=sorted(progress.bad_clips),
        bad_steps=list(progress.bad_steps),
        versions=program_versions(),
    )
