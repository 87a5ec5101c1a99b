"""The clips that models scored best and worst, with their spectrograms and sound."""

import base64
import io
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import soundfile  # type: ignore[import-untyped, unused-ignore]
import torch
from markupsafe import Markup
from matplotlib import colormaps
from PIL import Image

from erann_dist.data.clip_reader import ClipReader
from erann_dist.data.manifest import Task
from erann_dist.data.sources import load_sources
from erann_dist.errors import UserError
from erann_dist.models.log_mel import LogMel, mel
from erann_dist.models.mel_config import ERANN_MEL
from erann_dist.recipe import DataSource
from erann_dist.train.evaluation import Predictions
from jobs.html import page
from jobs.html.page import percent
from jobs.report.reading import Run

_SHOWN = 6  # Number of best and of worst clips.
_LIKELIEST = 3  # Number of most likely labels shown for a clip, besides the true ones.
_LEAST = 1e-7  # Lower limit of probabilities in the loss.
_COLUMNS = 320  # Maximum width of a picture in pixels; a clip's frames are averaged to fit.
_RANGE_DB, _SHADES = 80.0, 64
_HEARD_S, _MP3_LEVEL = 60, 0.6  # Seconds of sound per clip, and its compression; 10 s take some 100 kB.
_HERTZ = {500: "500", 2000: "2k", 8000: "8k"}


def _hertz_ticks() -> list[tuple[float, str]]:
    """Heights in a picture, with the frequencies to mark there."""
    corners = mel(torch.tensor([ERANN_MEL.f_min, ERANN_MEL.f_max, *map(float, _HERTZ)]))
    heights = ((corners[2:] - corners[0]) / (corners[1] - corners[0])).tolist()
    return list(zip(heights, _HERTZ.values(), strict=True))


_HERTZ_TICKS = _hertz_ticks()


@dataclass(frozen=True)
class Label:
    name: str
    score: float
    is_true: bool


@dataclass(frozen=True)
class Sound:
    """A clip's spectrogram and sound."""

    picture: bytes  # log-mel spectrogram, as PNG
    mp3: bytes  # MP3, which every browser plays
    seconds: float


@dataclass(frozen=True)
class Clip:
    """A clip and its scores."""

    row: int  # index among the evaluated clips
    key: str
    loss: float
    labels: list[Label]  # the true and the most likely ones, the highest score first


def clips_section(runs: Sequence[Run]) -> Markup:
    """The clips that these runs scored worst and best, with spectrograms; empty if the scores are unknown."""
    ends: tuple[list[tuple[Run, Clip]], list[tuple[Run, Clip]]] = [], []
    for run in runs:
        for end, clips in zip(ends, _of_run(run), strict=True):
            end += [(run, clip) for clip in clips]
    best = sorted(ends[0], key=lambda each: each[1].loss)[:_SHOWN]
    worst = sorted(ends[1], key=lambda each: -each[1].loss)[:_SHOWN]
    if not worst:
        return Markup()
    sounds: dict[tuple[str, int], Sound] = {}
    notes = []
    for run in runs:
        if rows := [clip.row for of, clip in (*worst, *best) if of is run]:
            found, why = _sounds_of(run, rows)
            sounds |= {(run.url, row): sound for row, sound in zip(rows, found, strict=False)}
            notes += [f"{run.name}: {why}" if len(runs) > 1 else why] if why else []
    tagging = any(run.metrics and run.metrics["task"] == "tagging" for run in runs)
    loss = "binary cross-entropy, averaged over the classes" if tagging else "cross-entropy"
    galleries = (
        gallery(
            (clip, sounds.get((run.url, clip.row)), f"{f'{run.name}, ' if len(runs) > 1 else ''}loss {clip.loss:.2f}")
            for run, clip in end
        )
        for end in (worst, best)
    )
    return page.section(
        "Worst and best clips",
        page.soft(" ".join([f"Ranked by {loss}; ✓ marks the true labels.", *notes])),
        page.element("subheading", "worst"),
        next(galleries),
        page.element("subheading", "best"),
        next(galleries),
    )


def _of_run(run: Run) -> tuple[list[Clip], list[Clip]]:
    """The run's best and worst clips; empty if its scores are unknown."""
    if not run.metrics or not run.scored:
        return [], []
    names = {c["id"]: c["name"] for c in run.metrics["per_class"]}
    labels = [names.get(label, label) for label in run.scored.label_ids]
    return best_and_worst(run.scored.keys, run.scored.predictions, labels, run.metrics["task"], _SHOWN)


def _sounds_of(run: Run, rows: Sequence[int]) -> tuple[list[Sound], str]:
    """Spectrograms and sounds of evaluated clips; or none, and why."""
    if not run.recipe or not run.scored:
        return [], "The spectrograms are omitted: without a recipe, the location of the clips is unknown."
    try:
        return sounds_of(run.recipe.data.eval, run.scored.keys, rows), ""
    except (UserError, OSError) as error:
        return [], f"The spectrograms are omitted: {error}"


def gallery(clips: Iterable[tuple[Clip, Sound | None, str]]) -> Markup:
    """Clips, each with its description and, if its sound is available, a spectrogram and a player."""
    return page.element("gallery", [_clip(*each) for each in clips])


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _clip(clip: Clip, sound: Sound | None, description: str) -> Markup:
    media = sound and {
        "picture": _data_url("image/png", sound.picture),
        "mp3": _data_url("audio/mpeg", sound.mp3),
        "seconds": f"{sound.seconds:.3g} s",
    }
    labels = [
        {"name": label.name, "score": label.score, "share": percent(label.score), "is_true": label.is_true}
        for label in clip.labels
    ]
    return page.element("clip", clip.key, description, media, _HERTZ_TICKS, labels)


def clip_losses(predictions: Predictions, task: Task) -> npt.NDArray[np.float64]:
    """Each clip's loss, (n,): cross-entropy, or for tagging binary cross-entropy averaged over the classes."""
    scores = np.clip(predictions.scores.astype(np.float64), _LEAST, 1 - _LEAST)
    likelihoods = np.where(predictions.targets > 0, scores, 1 - scores)
    if task == "tagging":
        return -np.log(likelihoods).mean(axis=1)
    return -np.log(np.where(predictions.targets > 0, scores, 1)).sum(axis=1)


def best_and_worst(
    keys: Sequence[str], predictions: Predictions, names: Sequence[str], task: Task, count: int
) -> tuple[list[Clip], list[Clip]]:
    """The clips with the lowest loss, the lowest first, and those with the highest, the highest first; disjoint."""
    losses = clip_losses(predictions, task)
    order = np.argsort(losses, kind="stable")
    order = order[np.isfinite(losses[order])]
    count = min(count, len(order) // 2)

    def clip(row: int) -> Clip:
        scores, targets = predictions.scores[row], predictions.targets[row]
        shown = {*np.flatnonzero(targets).tolist(), *np.argsort(-scores, kind="stable")[:_LIKELIEST].tolist()}
        labels = [Label(names[c], float(scores[c]), bool(targets[c])) for c in sorted(shown, key=lambda c: -scores[c])]
        return Clip(row, keys[row], float(losses[row]), labels)

    return [clip(row) for row in order[:count].tolist()], [clip(row) for row in order[::-1][:count].tolist()]


def sounds_of(sources: list[DataSource], keys: Sequence[str], rows: Sequence[int]) -> list[Sound]:
    """Log-mel spectrograms, high frequencies at the top, and the first minute of sound of evaluated clips.

    keys: the keys of all evaluated clips. rows: the indices of the requested ones.

    Raises UserError and OSError if the sources can no longer be read, or hold other clips.
    """
    clips = load_sources(sources)
    if clips.keys.to_pylist() != list(keys):
        raise UserError(f"{', '.join(source.url for source in sources)}: no longer the clips that were evaluated")
    log_mel = LogMel()

    rate = clips.info.sample_rate

    def sound(row: int) -> Sound:
        pcm = np.empty(clips.samples[row], np.int16)
        reader.crop(row, 0, pcm)
        frames = -(-len(pcm) // ERANN_MEL.hop)
        picture = _png(log_mel(torch.from_numpy(pcm).float()[None] / 32768)[0, 0, :, :frames].numpy())
        mp3 = io.BytesIO()
        soundfile.write(mp3, pcm[: _HEARD_S * rate], rate, format="MP3", compression_level=_MP3_LEVEL)
        return Sound(picture, mp3.getvalue(), len(pcm) / rate)

    with closing(ClipReader(clips)) as reader:
        return [sound(row) for row in rows]


def _png(log_mel: npt.NDArray[np.float32]) -> bytes:
    """The spectrogram as PNG. log_mel: (128, T) in dB, of which the colours cover the loudest 80 dB."""
    columns = min(_COLUMNS, log_mel.shape[1])
    averaged = np.stack([part.mean(axis=1) for part in np.array_split(log_mel, columns, axis=1)], axis=1)
    shades = (averaged - averaged.max() + _RANGE_DB) / _RANGE_DB * (_SHADES - 1)
    image = Image.fromarray(np.clip(shades, 0, _SHADES - 1).round().astype(np.uint8)[::-1])
    image.putpalette(colormaps["magma"](np.linspace(0, 1, _SHADES), bytes=True)[:, :3].tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
