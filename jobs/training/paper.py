"""The paper's results, shown next to ours: Verbitskiy et al., arXiv 2106.01621, tables of the experiments."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Accuracies:
    """The accuracies of one variant; None if not in the paper."""

    scratch: float | None
    finetuned: float | None


# By the name of the data set's shard set and the variant.
ACCURACY = {
    "esc50": {
        "ERANN-0-3": Accuracies(0.882, None),
        "ERANN-1-3": Accuracies(0.892, None),
        "ERANN-0-4": Accuracies(0.892, None),
        "ERANN-1-4": Accuracies(0.891, None),
        "ERANN-2-4": Accuracies(0.880, 0.949),
        "ERANN-2-5": Accuracies(0.879, 0.961),
        "ERANN-0-6": Accuracies(None, 0.953),
        "ERANN-1-6": Accuracies(None, 0.954),
        "ERANN-2-6": Accuracies(None, 0.959),
    },
    "urbansound8k": {
        "ERANN-0-3": Accuracies(0.823, None),
        "ERANN-1-3": Accuracies(0.829, None),
        "ERANN-0-4": Accuracies(0.826, None),
        "ERANN-1-4": Accuracies(0.835, None),
        "ERANN-2-4": Accuracies(0.826, 0.897),
        "ERANN-2-5": Accuracies(0.813, 0.903),
        "ERANN-0-6": Accuracies(None, 0.904),
        "ERANN-1-6": Accuracies(None, 0.906),
        "ERANN-2-6": Accuracies(None, 0.908),
    },
    "ravdess": {
        "ERANN-1-3": Accuracies(0.731, None),
        "ERANN-0-4": Accuracies(0.748, None),
        "ERANN-1-4": Accuracies(0.741, None),
        "ERANN-2-4": Accuracies(0.722, 0.730),
        "ERANN-2-5": Accuracies(0.720, 0.737),
        "ERANN-0-6": Accuracies(None, 0.743),
        "ERANN-1-6": Accuracies(None, 0.735),
        "ERANN-2-6": Accuracies(None, 0.734),
    },
}


# RAVDESS from scratch without pitch shift; the figures above are with it.
WITHOUT_PITCH_SHIFT = {"ERANN-1-3": 0.669, "ERANN-0-4": 0.705}


def accuracy(data_set: str, variant: str, finetuned: bool, pitch_shift: bool) -> float | None:
    """The paper's mean accuracy over the official folds, if it has one."""
    if data_set == "ravdess" and not pitch_shift:
        return None if finetuned else WITHOUT_PITCH_SHIFT.get(variant)
    figures = ACCURACY.get(data_set, {}).get(variant)
    if figures is None:
        return None
    return figures.finetuned if finetuned else figures.scratch


@dataclass(frozen=True)
class Augmented:
    """A row of the paper's augmentation table: an AudioSet run and its mAP."""

    variant: str
    crop_s: int
    specaugment: bool
    mixup: int  # 1 none, 2 standard and 3 modified on the waveform, 4 modified on the log-mel
    mean_ap: float


AUGMENTATION = [
    Augmented("ERANN-2-5", 8, True, 1, 0.430),
    Augmented("ERANN-2-5", 8, True, 2, 0.443),
    Augmented("ERANN-2-5", 8, True, 3, 0.446),
    Augmented("ERANN-2-5", 8, True, 4, 0.439),
    Augmented("ERANN-2-5", 8, False, 3, 0.441),
    Augmented("ERANN-2-6", 4, True, 3, 0.417),
    Augmented("ERANN-2-6", 8, True, 3, 0.450),
    Augmented("ERANN-2-6", 10, True, 3, 0.440),
]


# mAP on AudioSet by variant.
HYPERPARAMETERS = {
    "ERANN-2-4": 0.430,
    "ERANN-2-5": 0.446,
    "ERANN-0-6": 0.447,
    "ERANN-1-6": 0.450,
    "ERANN-2-6": 0.448,
    "ERANN-3-6": 0.436,
}
