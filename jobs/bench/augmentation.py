"""The cost of pitch shift: torchaudio's against ours, relative to a training example, on one CPU core."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from erann_dist import SAMPLE_RATE
from erann_dist.errors import UsageError
from erann_dist.models.log_mel import LogMel
from erann_dist.models.pitch import shift_pitch
from erann_dist.models.spec import build_model
from erann_dist.versions import import_torchaudio
from jobs.terminal.progress import console

torchaudio = import_torchaudio()

_SHIFTS = (-2, -1, 1, 2)  # Of the five that augment.pitch_shift=2 draws; 0 costs nothing.
_CLASSES = 8


def bench_augment(variant: str, crop_s: float, clips: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per clip: medians over rounds in which the measurements are interleaved.

    clips: number of clips shifted by each number of semitones. Raises UsageError for an unknown variant.
    """
    try:
        model = build_model(variant, _CLASSES)
    except ValueError as error:
        raise UsageError(str(error)) from error
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(clips, round(crop_s * SAMPLE_RATE), generator=generator)
    log_mel = LogMel(model.front_end)

    def own(waveform: Tensor, semitones: int) -> Tensor:
        return torchaudio.functional.pitch_shift(waveform, SAMPLE_RATE, semitones)

    def one_by_one() -> None:
        for semitones in _SHIFTS:
            own(noise[:1], semitones)

    def grouped(shift: Callable[[Tensor, int], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for semitones in _SHIFTS:
                shift(noise, semitones)

        return run

    def train() -> None:
        model(log_mel(noise)).sum().backward()

    ways: dict[str, tuple[Callable[[], None], int]] = {  # With the number of clips that each processes.
        "torchaudio_alone_ms": (one_by_one, len(_SHIFTS)),
        "torchaudio_ms": (grouped(own), clips * len(_SHIFTS)),
        "ours_ms": (grouped(shift_pitch), clips * len(_SHIFTS)),
        "front_end_ms": (lambda: log_mel(noise), clips),
        "training_example_ms": (train, clips),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):  # The first round is a warm-up.
        for way, (run, count) in ways.items():
            began = time.perf_counter()
            run()
            milliseconds = 1000 * (time.perf_counter() - began) / count
            console.print(f"round {number} of {rounds}  {way:22} {milliseconds:9.2f}")
            if number:
                times[way].append(milliseconds)
    medians = {way: round(statistics.median(each), 3) for way, each in times.items()}
    shifted = 2 * len(_SHIFTS) / (len(_SHIFTS) + 1)  # crops of an example with a fresh partner
    return {
        "variant": variant,
        "crop_s": crop_s,
        "clips_per_shift": clips,
        **medians,
        "speedup": round(medians["torchaudio_ms"] / medians["ours_ms"], 1),
        "share_of_example_torchaudio": round(shifted * medians["torchaudio_ms"] / medians["training_example_ms"], 4),
        "share_of_example_ours": round(shifted * medians["ours_ms"] / medians["training_example_ms"], 4),
    }
