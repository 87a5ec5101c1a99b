"""Evaluate a model folder on a shard set; tag a shard set or single files with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.launch import launch
from cluster.launch_spec import LaunchSpec
from erann_dist.data.sources import count_reported, load_source, require_labels, selection
from erann_dist.formats import strict_json
from erann_dist.log.events import Emit, Evaluated, EvaluationProgress, Incident
from erann_dist.models.log_mel import LogMel
from erann_dist.recipe import DataSource
from erann_dist.storage.folder import LocalFolder
from erann_dist.storage.slow_reads import SlowReads
from erann_dist.train import evaluation
from erann_dist.train.common_clips import common_detail, read_common
from erann_dist.train.distributed import Workers
from erann_dist.train.model_folder import find_model, load_model, require_fit, require_rate
from jobs.outputs import check_output
from jobs.sounds import read_sound

_TAG_WINDOW_SECONDS = 10


def evaluate(
    model: str,
    source: DataSource,
    common: str | None,
    out: Path,
    launcher: str,
    num_workers: int,
    device: str,
    on_event: Emit,
) -> dict[str, Any]:
    """Score each clip of the source once, and write metrics.json and predictions.parquet to `out`. Raises UserError.

    model: the URL of a model folder or a run, as in all functions of this module. common: another evaluation's
    predictions.parquet, to compare with on the clips that both have.
    """
    check_output(out / "metrics.json")
    folder = find_model(model)
    _, info = load_model(folder)
    clips = load_source(source)
    require_fit(folder, info, source.url, clips.info)
    require_labels(clips, source.url)
    if common:
        read_common(common, clips)  # an error of the file is found before the work
    config = {"model": model, "source": source.model_dump(), "common": common, "out": str(out)}
    launch(LaunchSpec(evaluate_worker, config, launcher, num_workers, device), on_event)
    metrics = evaluation.read_detail((out / "metrics.json").read_bytes())
    return {"model": str(folder), "out": str(out)} | metrics


def evaluate_worker(config: dict[str, Any], workers: Workers, emit: Emit) -> None:
    """The function that each worker runs for `evaluate`."""
    torch.set_num_threads(1)  # see run.threads of the recipe: the result must not depend on the machine
    model, info = load_model(find_model(config["model"]))
    source = DataSource(**config["source"])
    clips = load_source(source)
    progress, slow = _progress(workers, emit), SlowReads()
    predictions = evaluation.score(
        model.to(workers.device),
        clips,
        workers,
        loader_threads=2,
        pad_samples=info.pad_samples,
        progress=progress,
        slow=slow,
    )
    problems = [problem for problem in workers.gather(slow.problem) if problem]
    if problems:
        emit(Incident(0, "storage", problems[0]))
    if predictions:
        metrics = evaluation.detail(predictions, clips, len(clips) + count_reported(source))
        metrics["selection"] = selection(source)
        if config["common"]:
            metrics["common"] = common_detail(read_common(config["common"], clips), predictions, clips)
        out = LocalFolder(config["out"])
        with out.writing("predictions.parquet") as file:
            evaluation.write_predictions(file, predictions, clips)
        out.write("metrics.json", strict_json.dumps(metrics, indent=1).encode())
        emit(Evaluated(0, len(clips), evaluation.summarise(predictions, clips.info.task)))
    workers.barrier()


def tag_set(
    model: str, url: str, out: Path, launcher: str, num_workers: int, device: str, on_event: Emit
) -> dict[str, Any]:
    """Score each clip of a shard set once, ignoring its labels; write keys and scores to `out`. Raises UserError."""
    check_output(out)
    folder = find_model(model)
    _, info = load_model(folder)
    clips = load_source(DataSource(url=url))
    require_rate(folder, info, url, clips.info)
    out.parent.mkdir(parents=True, exist_ok=True)
    config = {"model": model, "url": url, "out": str(out)}
    launch(LaunchSpec(tag_worker, config, launcher, num_workers, device), on_event)
    return {"model": str(folder), "shards": url, "clips": len(clips), "out": str(out)}


def tag_worker(config: dict[str, Any], workers: Workers, emit: Emit) -> None:
    """The function that each worker runs for `tag_set`."""
    torch.set_num_threads(1)  # as in evaluate_worker
    model, info = load_model(find_model(config["model"]))
    clips = load_source(DataSource(url=config["url"]))
    model.to(workers.device)
    progress = _progress(workers, emit)
    scores = evaluation.score_stream(
        model, info.task, clips, workers, threads=2, pad_samples=info.pad_samples, progress=progress
    )
    if scores is not None:
        out = Path(config["out"])
        with LocalFolder(str(out.parent)).writing(out.name) as file:
            evaluation.write_scores(file, clips.keys, scores, info.label_ids)
    workers.barrier()


def _progress(workers: Workers, emit: Emit) -> Callable[[int, int], None]:
    """A callback that reports the number of clips done, on the first worker."""

    def progress(done: int, total: int) -> None:
        if workers.is_rank_zero:
            emit(EvaluationProgress(0, done, total))

    return progress


@torch.inference_mode()
def tag(model_url: str, files: list[Path], top: int) -> dict[str, list[dict[str, Any]]]:
    """The `top` most likely labels of audio files: path -> [{id, name, score}, ...]. Raises UserError.

    A file much longer than 10 s is scored in equal windows of about 10 s, and the scores are averaged.
    """
    model, info = load_model(find_model(model_url))
    log_mel = LogMel(model.front_end)

    def tags(file: Path) -> list[dict[str, Any]]:
        samples = read_sound(file, info.sample_rate)
        samples = np.pad(samples, (0, max(0, info.pad_samples - len(samples))))
        count = max(1, round(len(samples) / info.sample_rate / _TAG_WINDOW_SECONDS))
        logits = torch.cat([model(log_mel(part[None])) for part in torch.from_numpy(samples).tensor_split(count)])
        scores = evaluation.probabilities_of(logits, info.task).mean(dim=0)
        if not scores.isfinite().all():
            raise evaluation.NotFinite(f"{model_url}: its scores of {file} are not finite; the training diverged")
        best = scores.topk(min(top, len(scores)))
        return [
            {"id": info.label_ids[i], "name": info.label_names[i], "score": round(score, 4)}
            for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    return {str(file): tags(file) for file in files}
