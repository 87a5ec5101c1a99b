"""Verifying a shard set, with progress."""

from pathlib import Path
from typing import Any

from erann_dist.errors import UserError
from erann_dist.manifest import load_manifest
from jobs.progress import bar, console
from shards.verify import verify as verify_shards


def verify(shards: Path) -> dict[str, Any]:
    """Check a shard set. Raises UserError when anything is wrong, after a line for each problem."""
    manifest = load_manifest(shards)
    problems: list[str] = []
    with bar("verify", len(manifest)) as progress:
        done = 0
        for clips, found in verify_shards(shards):
            done += clips
            problems += found
            progress.update(done)
    if problems:
        for problem in problems:
            console.print(problem, markup=False)
        raise UserError(
            f"{shards}: {len(problems)} problem{'s' * (len(problems) > 1)}; pack the set anew or restore it"
        )
    return {"shards": str(shards), "clips": len(manifest), "tars": len(manifest.shard_paths)}
