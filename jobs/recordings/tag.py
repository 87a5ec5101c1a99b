"""Tags over time, and embeddings, of recordings of any length."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from erann_dist.errors import UsageError
from erann_dist.models.base import AudioModel
from erann_dist.models.inference import inference_form
from erann_dist.models.log_mel import LogMel
from erann_dist.train.distributed import pick_device
from erann_dist.train.evaluation import NotFinite, probabilities_of
from erann_dist.train.model_folder import ModelInfo, find_model, load_model
from jobs.outputs import check_output
from jobs.recordings.events import find_events
from jobs.recordings.scan import Recording, find_recordings, scan
from jobs.recordings.tables import require_table, table_writer
from jobs.terminal.progress import bar

_EVENT_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("start", pa.float64()),  # s
        ("end", pa.float64()),
        ("label", pa.string()),
        ("name", pa.string()),
        ("mean", pa.float32()),  # probability
        ("peak", pa.float32()),
    ]
)


@dataclass(frozen=True)
class TagOptions:
    """How recordings are tagged. Times in seconds."""

    window: float = 10.0
    hop: float = 5.0
    threshold: float = 0.5  # of the events
    audacity: Path | None = None  # a folder for a label track of each recording
    device: str = "auto"  # auto, cpu or cuda


def tag_recordings(model_url: str, places: Sequence[str], out: Path, options: TagOptions) -> dict[str, Any]:
    """Score windows of recordings; write every window's probabilities to `out`, and the events to a second table.

    A file that can't be read is a row with the reason. What is finished when the command is interrupted is kept. Raises
    UsageError, UserError.
    """
    if not 0 <= options.threshold <= 1:
        raise UsageError(f"--threshold {options.threshold:g}: is not between 0 and 1")
    events_out = out.with_suffix(f".events{out.suffix}")
    files, model, info = _prepare(model_url, places, [out, events_out], options.window, options.hop)
    if options.audacity:
        check_output(options.audacity / "labels.txt")
        options.audacity.mkdir(parents=True, exist_ok=True)
    device = pick_device(options.device)

    def probabilities(x: Tensor) -> Tensor:
        return probabilities_of(form(x).float(), info.task)

    form = inference_form(model).to(device)
    names = "\n".join(" ".join(name.split()) for name in info.label_names)
    scores = pa.field("scores", pa.list_(pa.float32()), metadata={"columns": names})
    schema = _window_schema(scores).with_metadata({"labels": "\n".join(info.label_ids)})
    totals = {"windows": 0, "events": 0, "unreadable": 0}
    with ExitStack() as stack:
        write = stack.enter_context(table_writer(out, schema))
        write_events = stack.enter_context(table_writer(events_out, _EVENT_SCHEMA))
        compute = _computation(model, device, probabilities)
        for found in _scanned(files, compute, info, options.window, options.hop):
            values = np.array(found.values, np.float32).reshape(-1, len(info.label_ids))
            if not np.isfinite(values).all():
                raise NotFinite(f"{model_url}: its scores of {found.file} are not finite; the training diverged")
            write(_window_rows(found, "scores"))
            events = list(find_events(np.array(found.starts), np.array(found.ends), values, options.threshold))
            rows = [
                {
                    "file": str(found.file),
                    "start": event.start,
                    "end": event.end,
                    "label": info.label_ids[event.label],
                    "name": info.label_names[event.label],
                    "mean": event.mean,
                    "peak": event.peak,
                }
                for event in events
            ]
            write_events(rows)
            if options.audacity:
                track = "".join(
                    f"{event.start:.3f}\t{event.end:.3f}\t{_line(info.label_names[event.label])}\n" for event in events
                )
                (options.audacity / f"{_flat(found.file)}.txt").write_text(track, encoding="utf-8")
            totals["windows"] += len(found.starts)
            totals["events"] += len(rows)
            totals["unreadable"] += found.problem is not None
    return {"model": model_url, "recordings": len(files), **totals, "out": str(out), "events_out": str(events_out)}


def embed_recordings(
    model_url: str, places: Sequence[str], out: Path, window: float, hop: float, device: str
) -> dict[str, Any]:
    """Write the model's embedding of every window of recordings to `out`. As in tag_recordings."""
    files, model, info = _prepare(model_url, places, [out], window, hop)
    chosen = pick_device(device)
    form = inference_form(model).to(chosen)
    size = model.embed(torch.zeros(1, 1, model.front_end.mel_bins, model.front_end.frames(1))).shape[1]
    columns = "\n".join(f"vector.{i}" for i in range(size))
    schema = _window_schema(pa.field("vector", pa.list_(pa.float32()), metadata={"columns": columns}))
    totals = {"windows": 0, "unreadable": 0}
    with table_writer(out, schema) as write:
        compute = _computation(model, chosen, lambda x: form.embed(x).float())
        for found in _scanned(files, compute, info, window, hop):
            write(_window_rows(found, "vector"))
            totals["windows"] += len(found.starts)
            totals["unreadable"] += found.problem is not None
    return {"model": model_url, "recordings": len(files), **totals, "size": size, "out": str(out)}


def _prepare(
    model_url: str, places: Sequence[str], outs: list[Path], window: float, hop: float
) -> tuple[list[Path], AudioModel, ModelInfo]:
    """The recordings and the model, after everything that can be checked was. Raises UsageError, UserError."""
    for out in outs:
        require_table(out)
        check_output(out)
    if not 0 < hop <= window:
        raise UsageError(f"--hop {hop:g}: has to be greater than 0 and at most --window {window:g}")
    if window < 0.05:
        raise UsageError(f"--window {window:g}: has to be at least 0.05 s")
    files = find_recordings(places)
    model, info = load_model(find_model(model_url))
    outs[0].parent.mkdir(parents=True, exist_ok=True)
    return files, model, info


def _computation(
    model: AudioModel, device: torch.device, function: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], npt.NDArray[np.float32]]:
    """From windows (B, n) at 44.1 kHz to the function's values of their spectrograms, (B, D)."""
    log_mel = LogMel(model.front_end).to(device)

    @torch.inference_mode()
    def compute(windows: Tensor) -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float32] = function(log_mel(windows.to(device))).cpu().numpy()
        return values

    return compute


def _scanned(
    files: list[Path],
    compute: Callable[[Tensor], npt.NDArray[np.float32]],
    info: ModelInfo,
    window: float,
    hop: float,
) -> Iterator[Recording]:
    """The recordings' values, with progress."""
    with bar("recordings", len(files)) as progress:
        done = 0

        def on_seconds(seconds: float) -> None:
            progress.update(done, f"{seconds:.0f} s")

        for found in scan(files, compute, info.sample_rate, window, hop, info.pad_samples, on_seconds):
            yield found
            done += 1
            progress.update(done)


def _window_schema(values: pa.Field) -> pa.Schema:
    return pa.schema(
        [
            ("file", pa.string()),
            ("start", pa.float64()),  # s
            ("end", pa.float64()),
            values,
            ("problem", pa.string()),  # why a recording has no window
        ]
    )


def _window_rows(found: Recording, column: str) -> list[dict[str, Any]]:
    if found.problem is not None:
        return [{"file": str(found.file), "start": None, "end": None, column: None, "problem": found.problem}]
    return [
        {"file": str(found.file), "start": start, "end": end, column: value.tolist(), "problem": None}
        for start, end, value in zip(found.starts, found.ends, found.values, strict=True)
    ]


def _line(text: str) -> str:
    return " ".join(text.split())


def _flat(file: Path) -> str:
    """The file's path as a name."""
    return str(file).lstrip("/").replace("/", "_")
