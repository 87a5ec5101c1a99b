"""A small synthetic AudioSet on disk, in AudioSet's own layout, so that a demo runs the same code as real data.

Eleven of AudioSet's classes are synthesised, those that a formula reproduces faithfully. A clip mixes one to three of
them, the training list is as unbalanced as AudioSet's, and the files are in as many formats as in real copies of it.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import soundfile  # type: ignore[import-untyped, unused-ignore]
from numpy.polynomial.chebyshev import chebval

Array = npt.NDArray[np.float64]
Rng = np.random.Generator


@dataclass(frozen=True)
class SyntheticAudioSet:
    classes: Path  # class_labels_indices.csv: index,mid,display_name
    train_segments: Path  # YTID, start_seconds, end_seconds, "mid,mid"
    eval_segments: Path
    audio: Path  # folder with one file per clip, train and eval both

    @classmethod
    def at(cls, root: Path) -> "SyntheticAudioSet":
        """The paths that write_synthetic_audioset(root) writes."""
        names = ("class_labels_indices.csv", "train_segments.csv", "eval_segments.csv", "audio")
        return cls(*(root / name for name in names))


# The sounds: each function takes a generator, a number of samples and a rate in Hz, and returns (samples,) at
# any level. Events fill the whole clip, so that a crop of two seconds contains what its label states; tones are
# below 8 kHz, so that the lowest sample rate preserves them.


def heartbeat(rng: Rng, samples: int, rate: int) -> Array:
    """Two low thumps per beat, 55 to 110 beats per minute; the second, a third of a beat later, is higher."""
    period = 60 / rng.uniform(55, 110)
    phase = clock(rng, samples, rate) % period
    lub = thump(phase, rng.uniform(45, 75), rng.uniform(0.020, 0.035))
    dub = thump(phase - rng.uniform(0.30, 0.38) * period, rng.uniform(70, 110), rng.uniform(0.012, 0.020))
    return lub + rng.uniform(0.5, 0.9) * dub


def dial(rng: Rng, samples: int, rate: int) -> Array:
    """Random telephone keys, each a low and a high tone of the DTMF standard, with pauses in between."""
    time = clock(rng, samples, rate)
    on, off = rng.uniform(0.08, 0.2), rng.uniform(0.05, 0.15)
    key = (time / (on + off)).astype(int)
    low = rng.choice([697.0, 770.0, 852.0, 941.0], key[-1] + 1)[key]
    high = rng.choice([1209.0, 1336.0, 1477.0, 1633.0], key[-1] + 1)[key]
    return gate(time % (on + off), on, 0.003) * (sine(low * time) + rng.uniform(0.7, 1.4) * sine(high * time))


def siren(rng: Rng, samples: int, rate: int) -> Array:
    """A tone with overtones gliding up and down without pause, in a wail (2 to 5 s) or a yelp (to 0.5 s)."""
    period = rng.uniform(2, 5) if rng.random() < 0.6 else rng.uniform(0.25, 0.5)
    low, high = rng.uniform(450, 700), rng.uniform(1100, 1700)
    frequency = low + (high - low) * (0.5 + 0.5 * sine(clock(rng, samples, rate) / period))
    return harmonics(np.power(rng.uniform(0.3, 0.8), np.arange(4)), np.cumsum(frequency) / rate)


def tick_tock(rng: Rng, samples: int, rate: int) -> Array:
    """A clock: two alternating clicks, 0.3 to 0.8 s apart, each two resonances that decay in milliseconds."""
    period = rng.uniform(0.3, 0.8)
    time = clock(rng, samples, rate)
    phase = time % period
    pitch = np.where(time // period % 2 == 0, 1.0, rng.uniform(0.65, 0.8))
    body = sine(rng.uniform(1000, 2000) * pitch * phase) * np.exp(-phase / rng.uniform(0.004, 0.008))
    return body + sine(rng.uniform(3000, 6000) * pitch * phase) * np.exp(-phase / rng.uniform(0.002, 0.004))


def beep(rng: Rng, samples: int, rate: int) -> Array:
    """The square wave of a cheap buzzer, 0.7 to 1.2 kHz and odd harmonics, switched on and off at a steady pace."""
    time = clock(rng, samples, rate)
    on, off = rng.uniform(0.08, 0.25), rng.uniform(0.1, 0.3)
    levels = np.array([1.0, 0.0, 0.6, 0.0, 0.4, 0.0, 0.3]) * rng.uniform(0.7, 1.3, 7)
    tone = harmonics(levels, rng.uniform(700, 1200) * time)
    return gate(time % (on + off), on, 0.003) * tone


def sine_wave(rng: Rng, samples: int, rate: int) -> Array:
    """One steady tone, 300 Hz to 1 kHz, as for testing."""
    return sine(rng.uniform(300, 1000) * clock(rng, samples, rate))


def chirp_tone(rng: Rng, samples: int, rate: int) -> Array:
    """A pure tone rising over four octaves in 0.4 to 1 s, repeatedly."""
    length = rng.uniform(0.4, 1.0)
    phase = clock(rng, samples, rate) % (length + rng.uniform(0.05, 0.2))
    start, end = rng.uniform(250, 400), rng.uniform(4500, 6500)
    frequency = start * (end / start) ** np.minimum(phase / length, 1.0)
    return gate(phase, length, 0.01) * sine(np.cumsum(frequency) / rate)


def static(rng: Rng, samples: int, rate: int) -> Array:
    """A badly tuned radio: 15 to 60 crackles per second, bursts of noise of uneven levels, over a hiss."""
    crackles = rng.integers(samples, size=round(rng.uniform(15, 60) * samples / rate))
    strength = np.bincount(crackles, rng.lognormal(0.0, 0.8, len(crackles)), samples)
    decay = np.exp(-np.arange(samples) / (rate * rng.uniform(0.001, 0.003)))
    envelope = np.fft.irfft(np.fft.rfft(strength) * np.fft.rfft(decay), samples)
    return (envelope + rng.uniform(0.02, 0.06)) * rng.standard_normal(samples)


def mains_hum(rng: Rng, samples: int, rate: int) -> Array:
    """50 or 60 Hz and its harmonics, the even ones stronger: a transformer's iron is pulled twice a cycle."""
    levels = rng.uniform(0.3, 1.0, 10) * np.tile([0.4, 1.0], 5) * np.arange(1, 11) ** -rng.uniform(0.5, 1.2)
    return harmonics(levels, rng.choice([50.0, 60.0]) * rng.uniform(0.998, 1.002) * clock(rng, samples, rate))


def white_noise(rng: Rng, samples: int, rate: int) -> Array:
    """Noise with the same power in every hertz, give or take a tilt of 0.6 dB per octave."""
    return coloured_noise(rng, samples, rate, rng.uniform(-0.2, 0.2))


def pink_noise(rng: Rng, samples: int, rate: int) -> Array:
    """Noise with the same power in every octave, give or take a tilt of 0.6 dB per octave."""
    return coloured_noise(rng, samples, rate, rng.uniform(0.8, 1.2))


def clock(rng: Rng, samples: int, rate: int) -> Array:
    """Time in seconds (samples,), from a random start: a clip is cut anywhere out of a longer recording."""
    return rng.uniform(0, 10) + np.arange(samples) / rate


def sine(cycles: Array) -> Array:
    turn = (cycles - np.floor(cycles)).astype(np.float32)  # within one turn single precision is enough
    wave: Array = np.sin(2 * np.pi * turn)
    return wave


def harmonics(levels: Array, cycles: Array) -> Array:
    """A fundamental with the phase `cycles` (samples,), and its overtones: levels (harmonics,)."""
    # Chebyshev polynomials turn the cosine of an angle into the cosines of its multiples.
    tone: Array = chebval(np.cos(2 * np.pi * cycles), np.concatenate([[0.0], levels]))
    return tone


def gate(phase: Array, length: float, ramp: float) -> Array:
    """An envelope (samples,): 1 while `phase` is between 0 and `length`, with linear ramps, in seconds."""
    return np.clip(np.minimum(phase, length - phase) / ramp, 0.0, 1.0)


def thump(phase: Array, frequency: float, decay: float) -> Array:
    """A tone (samples,) of `frequency` in Hz that swells at phase 0 and decays with `decay`, in seconds."""
    phase = np.maximum(phase, 0.0)
    return phase / decay * np.exp(1 - phase / decay) * sine(frequency * phase)


def coloured_noise(rng: Rng, samples: int, rate: int, exponent: float) -> Array:
    """Gaussian noise (samples,) whose power falls as 1 / frequency^exponent above 20 Hz."""
    frequency = np.maximum(np.fft.rfftfreq(samples, 1 / rate), 20.0)
    return np.fft.irfft(np.fft.rfft(rng.standard_normal(samples)) * frequency ** (-exponent / 2), samples)


@dataclass(frozen=True)
class Sound:
    mid: str
    display_name: str
    rank: int  # 0: the commonest in the training list; the classes that are hardest to learn are common
    synthesise: Callable[[Rng, int, int], Array]


SOUNDS = (  # in the order of AudioSet's class index
    Sound("/m/01jg02", "Heart sounds, heartbeat", 2, heartbeat),
    Sound("/m/02c8p", "Telephone dialing, DTMF", 3, dial),
    Sound("/m/03kmc9", "Siren", 6, siren),
    Sound("/m/07qjznl", "Tick-tock", 5, tick_tock),
    Sound("/m/02fs_r", "Beep, bleep", 4, beep),
    Sound("/m/01v_m0", "Sine wave", 0, sine_wave),
    Sound("/m/0hdsk", "Chirp tone", 1, chirp_tone),
    Sound("/m/07rgkc5", "Static", 9, static),
    Sound("/m/06xkwv", "Mains hum", 10, mains_hum),
    Sound("/m/0chx_", "White noise", 7, white_noise),
    Sound("/m/0cj0r", "Pink noise", 8, pink_noise),
)

# Container, codec and rates in Hz, with libsndfile's names; it has no AAC, which PyAV writes.
FORMATS = {
    ".wav": ("WAV", "PCM_16", (16000, 22050, 32000, 44100)),
    ".flac": ("FLAC", "PCM_16", (16000, 32000, 48000)),
    ".ogg": ("OGG", "VORBIS", (32000, 44100)),
    ".mp3": ("MP3", "MPEG_LAYER_III", (16000, 22050, 44100)),
    ".opus": ("OGG", "OPUS", (48000,)),
    ".m4a": ("mp4", "AAC", (32000, 44100)),
}
DEAL = [".m4a", ".opus", ".mp3", ".mp3"] + 4 * [".ogg", ".wav", ".flac", ".wav", ".flac", ".wav", ".flac"]
ID_LETTERS = list("-_0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")


@dataclass(frozen=True)
class Clip:
    ytid: str
    start: int  # seconds
    labels: list[int]  # indices into SOUNDS
    path: Path
    rate: int  # Hz
    channels: int


def write_synthetic_audioset(
    root: Path,
    train_clips: int = 400,
    eval_clips: int = 160,
    duration: float = 10.0,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda done: None,
) -> SyntheticAudioSet:
    """Write class index, segment lists and clips of `duration` seconds under `root`.

    on_progress: called with the number of clips written so far.

    In the training list the commonest class is 25 times as frequent as the rarest; one of its clips has no file, and
    one file is not audio. The evaluation list is balanced and complete.
    """
    places = SyntheticAudioSet.at(root)
    audio, lists = places.audio, (places.train_segments, places.eval_segments)
    audio.mkdir(parents=True, exist_ok=True)
    rows = [f'{i},{sound.mid},"{sound.display_name}"\n' for i, sound in enumerate(SOUNDS)]
    places.classes.write_text("index,mid,display_name\n" + "".join(rows))

    balanced = np.ones(len(SOUNDS))
    unbalanced = np.geomspace(25.0, 1.0, len(SOUNDS))[[sound.rank for sound in SOUNDS]]
    for split, (count, shares) in enumerate(((train_clips, unbalanced), (eval_clips, balanced))):
        # The clips themselves use the seeds [seed, split, 0] to [seed, split, count - 1].
        clips = plan_clips(np.random.default_rng([seed, split, count]), count, shares, duration, audio)
        write_segments(lists[split], clips, duration)
        with ThreadPoolExecutor(2) as pool:  # numpy and the encoders release the GIL
            seeds = ([seed, split, index] for index in range(count))
            for done, _ in enumerate(pool.map(write_clip, clips, [duration] * count, seeds), split * train_clips + 1):
                on_progress(done)
        if split == 0:  # both clips are of the commonest class, so that the rare classes lose none
            missing, corrupt = [clip for clip in clips if clip.labels == [int(np.argmax(shares))]][:2]
            missing.path.unlink()
            corrupt.path.write_bytes(b"<html><body>403 Forbidden</body></html>\n")
    return places


def plan_clips(rng: Rng, count: int, shares: Array, duration: float, audio: Path) -> list[Clip]:
    """The clips of a list, sorted by id as AudioSet's are, with the file names found in real copies."""
    ytids = ["".join(rng.choice(ID_LETTERS, 11)) for _ in range(count)]
    ytids[0] = "-" + ytids[0][1:]  # AudioSet has such ids, which command lines mistake for options
    clips = []
    for i, (ytid, labels) in enumerate(zip(sorted(ytids), draw_labels(rng, count, shares), strict=True)):
        start, suffix = 10 * int(rng.integers(30)), DEAL[i % len(DEAL)]
        milliseconds = f"{1000 * start}_{round(1000 * (start + duration))}"
        stem = rng.choice([ytid, f"Y{ytid}", f"{ytid}_{start}", f"{ytid}_{milliseconds}"])
        rate, channels = int(rng.choice(FORMATS[suffix][2])), int(rng.choice([1, 1, 1, 2]))
        clips.append(Clip(ytid, start, labels, audio / f"{stem}{suffix}", rate, channels))
    return clips


def draw_labels(rng: Rng, count: int, shares: Array) -> list[list[int]]:
    """The classes of each clip: one in 65 % of the clips, two in 25 % and three in 10 %.

    Each class gets exactly its share of all labels, up to rounding, with any seed: the classes of a clip are drawn in
    proportion to what is left of each, triples first, while enough of every class is left.
    """
    triples, pairs = round(0.10 * count), round(0.25 * count)
    sizes = [3] * triples + [2] * pairs + [1] * (count - triples - pairs)
    left = np.diff(np.round(np.cumsum(shares) / shares.sum() * sum(sizes)), prepend=0.0)
    drawn = []
    for size in sizes:
        labels = rng.choice(len(left), size, replace=False, p=left / left.sum())
        left[labels] -= 1
        drawn.append(sorted(labels.tolist()))
    return [drawn[i] for i in rng.permutation(count)]


def write_segments(path: Path, clips: list[Clip], duration: float) -> None:
    labels = [label for clip in clips for label in clip.labels]
    sizes = f"num_ytids={len(clips)}, num_segs={len(clips)}"
    with path.open("w") as file:
        file.write("# Segments csv of synthetic sounds in place of recordings\n")
        file.write(f"# {sizes}, num_unique_labels={len(set(labels))}, num_positive_labels={len(labels)}\n")
        file.write("# YTID, start_seconds, end_seconds, positive_labels\n")
        for clip in clips:
            mids = ",".join(SOUNDS[label].mid for label in clip.labels)
            file.write(f'{clip.ytid}, {clip.start:.3f}, {clip.start + duration:.3f}, "{mids}"\n')


def write_clip(clip: Clip, duration: float, seed: list[int]) -> None:
    sounds = [SOUNDS[label] for label in clip.labels]
    audio = mix(np.random.default_rng(seed), sounds, round(duration * clip.rate), clip.rate, clip.channels)
    container, codec, _ = FORMATS[clip.path.suffix]
    if codec == "AAC":
        layout = "mono" if clip.channels == 1 else "stereo"
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio.T, np.float32), "fltp", layout)
        frame.sample_rate = clip.rate
        with av.open(clip.path, "w", container) as muxer:
            stream = muxer.add_stream("aac", rate=clip.rate, layout=layout)
            muxer.mux(stream.encode(frame) + stream.encode(None))
        return
    with soundfile.SoundFile(clip.path, "w", clip.rate, clip.channels, codec, format=container) as file:
        for start in range(0, len(audio), clip.rate):  # Vorbis puts each write on the thread's stack
            file.write(audio[start : start + clip.rate])


def mix(rng: Rng, sounds: list[Sound], samples: int, rate: int, channels: int) -> Array:
    """The sounds within 6 dB of each other, each with its own panning: (samples, channels) in [-1, 1]."""
    # With a recorder's noise in the background, because no recording is silent between its sounds.
    mixed = rng.standard_normal((samples, channels)) * 10 ** (-rng.uniform(45, 55) / 20)
    for sound in sounds:
        audio = sound.synthesise(rng, samples, rate)
        gain = 10 ** (-rng.uniform(0, 6) / 20) / np.sqrt(np.mean(audio**2))
        panorama = rng.uniform(0.5, 1.0, channels)
        mixed += np.outer(gain * audio, panorama / panorama.mean())
    mixed *= 0.95 * 10 ** (-rng.uniform(0, 12) / 20) / np.abs(mixed).max()
    return mixed
