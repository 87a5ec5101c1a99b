"""A recipe's data: the clips that its sources select."""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from erann_dist.errors import UsageError, UserError
from erann_dist.features import SAMPLE_RATE
from erann_dist.manifest import REPORT, Manifest, concatenate, load_manifest
from erann_dist.recipe import DataSource


def load_source(source: DataSource) -> Manifest:
    """The clips of one source. Raises UserError when there are none, or at a rate that no ERANN takes."""
    manifest = load_manifest(Path(source.url))
    if manifest.info.sample_rate != SAMPLE_RATE:
        raise UserError(
            f"{source.url}: holds {manifest.info.sample_rate} Hz, ERANN takes {SAMPLE_RATE} Hz; pack it anew"
        )
    keep = np.ones(len(manifest), dtype=np.bool_)
    if source.split is not None:
        keep &= pc.equal(manifest.splits, source.split).fill_null(False).to_numpy()
    if source.fold is not None:
        keep &= np.isin(manifest.folds, source.fold)
    if not keep.any():
        folds = sorted(set(manifest.folds[manifest.folds >= 0].tolist()))
        splits = sorted(s for s in pc.unique(manifest.splits).to_pylist() if s is not None)
        raise UsageError(
            f"{source.url}: no clip has split {source.split} and fold {source.fold}; "
            f"there are the splits {splits} and the folds {folds}"
        )
    return manifest if keep.all() else manifest.select(keep)


def load_sources(sources: list[DataSource]) -> Manifest:
    """The clips of all sources as one. Raises UserError when their labels differ."""
    return concatenate([load_source(source) for source in sources])


def count_reported(sources: list[DataSource]) -> int:
    """Source rows that did not get into the sources' shard sets."""
    return sum(pq.read_metadata(Path(source.url) / REPORT).num_rows for source in sources)
