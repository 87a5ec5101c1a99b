"""Metrics against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, average_precision_score, confusion_matrix, roc_auc_score

from erann_dist.train.metrics import classification_metrics, tagging_metrics

SHAPES = st.tuples(st.integers(2, 80), st.integers(1, 8), st.integers(0, 2**32 - 1), st.integers(1, 60))


def random_case(shape: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    clips, classes, seed, levels = shape
    rng = np.random.default_rng(seed)
    scores = rng.integers(levels, size=(clips, classes)) / levels  # few levels: many ties
    return scores.astype(np.float32), (rng.random((clips, classes)) < rng.random(classes)).astype(np.float32)


@given(SHAPES)
@settings(max_examples=150, deadline=None)
def test_tagging_equals_scikit_learn(shape: tuple[int, int, int, int]) -> None:
    scores, targets = random_case(shape)
    with_positives = [c for c in range(targets.shape[1]) if targets[:, c].any()]
    if not with_positives:
        with pytest.raises(ValueError, match="no class"):
            tagging_metrics(scores, targets)
        return
    result = tagging_metrics(scores, targets)
    ap = [average_precision_score(targets[:, c], scores[:, c]) for c in with_positives]
    np.testing.assert_allclose(result.ap[with_positives], ap, rtol=0, atol=1e-9)
    assert result.mean_ap == pytest.approx(np.mean(ap), abs=1e-9)
    assert result.left_out == [c for c in range(targets.shape[1]) if c not in with_positives]
    with_both = [c for c in with_positives if not targets[:, c].all()]
    auc = [roc_auc_score(targets[:, c], scores[:, c]) for c in with_both]
    np.testing.assert_allclose(result.auc[with_both], auc, rtol=0, atol=1e-9)
    if with_both:
        assert result.mean_auc == pytest.approx(np.mean(auc), abs=1e-9)


@given(SHAPES)
@settings(max_examples=60, deadline=None)
def test_classification_equals_scikit_learn(shape: tuple[int, int, int, int]) -> None:
    scores, _ = random_case(shape)
    clips, classes = scores.shape
    true = np.random.default_rng(shape[2]).integers(classes, size=clips)
    result = classification_metrics(scores, np.eye(classes)[true])
    predicted = scores.argmax(axis=1)
    assert result.accuracy == pytest.approx(accuracy_score(true, predicted), abs=1e-9)
    assert np.array_equal(result.confusion, confusion_matrix(true, predicted, labels=np.arange(classes)))
    for c in range(classes):
        own = predicted[true == c]
        assert np.isnan(result.class_accuracy[c]) if not len(own) else result.class_accuracy[c] == np.mean(own == c)


def test_d_prime_of_the_papers_auc() -> None:
    """ERANN-1-6: mAUC .976 and d′ 2.804 (the printed AUC is rounded)."""
    rng = np.random.default_rng(0)
    positives, negatives = rng.standard_normal(200_000) + 2.804, rng.standard_normal(200_000)
    scores = np.concatenate([positives, negatives])[:, None]
    targets = np.repeat([1, 0], 200_000)[:, None]
    result = tagging_metrics(scores, targets)
    assert result.mean_auc == pytest.approx(0.976, abs=1e-3)
    assert result.d_prime == pytest.approx(2.804, abs=0.02)


def test_perfect_scores_have_no_finite_d_prime() -> None:
    result = tagging_metrics(np.array([[0.9], [0.1]]), np.array([[1], [0]]))
    assert (result.mean_ap, result.mean_auc, result.d_prime) == (1.0, 1.0, float("inf"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_have_no_metric(bad: float) -> None:
    """As scikit-learn has it; argmax would take NaN as the largest."""
    scores, targets = random_case((20, 3, 0, 60))
    scores[7, 1] = bad
    for metrics in (tagging_metrics, classification_metrics):
        with pytest.raises(ValueError, match="not finite"):
            metrics(scores, targets)
