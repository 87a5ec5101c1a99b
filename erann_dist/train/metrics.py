"""Metrics of tagging and classification, in double precision.

torchmetrics is not used because it computes its curves in float32. The definitions are those of scikit-learn's
average_precision_score and roc_auc_score (tied scores count as one threshold).
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TaggingMetrics:
    """Macro means over the classes, and each class's metrics. A class without positives is nan and not averaged."""

    mean_ap: float
    mean_auc: float
    d_prime: float  # √2 · Φ⁻¹(mean_auc)
    ap: F64  # (N,)
    auc: F64  # (N,); nan also for a class without negatives

    @property
    def left_out(self) -> list[int]:
        """The classes without positives."""
        return np.flatnonzero(np.isnan(self.ap)).tolist()


@dataclass(frozen=True)
class ClassificationMetrics:
    accuracy: float
    confusion: npt.NDArray[np.int64]  # (N, N): rows are the true classes, columns the predicted ones
    class_accuracy: F64  # (N,), nan for a class without clips


def tagging_metrics(scores: npt.NDArray[np.floating], targets: npt.NDArray[np.generic]) -> TaggingMetrics:
    """mAP, mAUC and d′. scores: (n, N), targets: (n, N) of 0 and 1.

    Raises ValueError when no class has a positive, and for scores that are not finite.
    """
    _require_finite(scores)
    positive = np.asarray(targets) > 0.5
    pairs = [_ap_and_auc(scores[:, c], positive[:, c]) for c in range(scores.shape[1])]
    ap, auc = (np.array(values) for values in zip(*pairs, strict=True))
    if np.isnan(ap).all():
        raise ValueError("no class has a positive clip: there is nothing to average")
    mean_auc = float(np.nanmean(auc)) if not np.isnan(auc).all() else float("nan")
    return TaggingMetrics(float(np.nanmean(ap)), mean_auc, _d_prime(mean_auc), ap, auc)


def classification_metrics(scores: npt.NDArray[np.floating], targets: npt.NDArray[np.generic]) -> ClassificationMetrics:
    """Accuracy and confusion matrix. scores: (n, N), targets: (n, N) one-hot.

    Raises ValueError for scores that are not finite.
    """
    _require_finite(scores)
    classes = scores.shape[1]
    true, predicted = np.argmax(targets, axis=1), np.argmax(scores, axis=1)
    confusion = np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)
    counts = confusion.sum(axis=1)
    class_accuracy = np.full(classes, np.nan)
    np.divide(confusion.diagonal(), counts, out=class_accuracy, where=counts > 0)
    return ClassificationMetrics(float(np.mean(true == predicted)), confusion, class_accuracy)


def _require_finite(scores: npt.NDArray[np.floating]) -> None:
    if not np.isfinite(scores).all():
        raise ValueError("scores that are not finite have no ranking")


def _ap_and_auc(scores: npt.NDArray[np.floating], positive: npt.NDArray[np.bool_]) -> tuple[float, float]:
    positives = int(positive.sum())
    if positives == 0:
        return float("nan"), float("nan")
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last_of_tie = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    true_positives = np.cumsum(positive[order])[last_of_tie]
    false_positives = last_of_tie + 1 - true_positives
    precision = true_positives / (last_of_tie + 1)
    recall_gain = np.diff(true_positives, prepend=0) / positives
    average_precision = float(np.sum(precision * recall_gain))
    negatives = len(ranked) - positives
    if negatives == 0:
        return average_precision, float("nan")
    heights = true_positives + np.concatenate([[0], true_positives[:-1]])
    widths = np.diff(false_positives, prepend=0)
    return average_precision, float(np.sum(heights * widths) / (2 * positives * negatives))


def _d_prime(auc: float) -> float:
    if not 0 < auc < 1:
        return float("nan") if np.isnan(auc) else float("inf") * (1 if auc == 1 else -1)
    return 2**0.5 * NormalDist().inv_cdf(auc)
