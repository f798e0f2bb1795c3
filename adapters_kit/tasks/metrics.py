"""Scores that several tasks share, through scikit-learn."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics


def classification(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores of single-label predictions.

    Args:
        probabilities: (examples, classes).
        labels: (examples,), class numbers.
    """
    guesses = probabilities.argmax(-1)
    classes = list(range(probabilities.shape[-1]))
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, guesses, labels=classes, average="macro", zero_division=0
    )
    picked = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, None)
    return {
        "loss": float(-np.log(picked).mean()),
        "accuracy": float(metrics.accuracy_score(labels, guesses)),
        "f1": float(f1),
        "f1_micro": float(metrics.f1_score(labels, guesses, labels=classes, average="micro", zero_division=0)),
        "precision": float(precision),
        "recall": float(recall),
        "mcc": float(metrics.matthews_corrcoef(labels, guesses)),
    }


def multi_label(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores of predictions where any number of classes may hold; both arrays are (examples, classes)."""
    guesses = probabilities >= 0.5
    labels = labels.astype(bool)
    clipped = np.clip(probabilities, 1e-12, 1 - 1e-12)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, guesses, average="macro", zero_division=0
    )
    return {
        "loss": float(-np.where(labels, np.log(clipped), np.log(1 - clipped)).mean()),
        "accuracy": float((guesses == labels).all(-1).mean()),
        "f1": float(f1),
        "f1_micro": float(metrics.f1_score(labels, guesses, average="micro", zero_division=0)),
        "precision": float(precision),
        "recall": float(recall),
    }


def regression(predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Squared and absolute error, Pearson's and Spearman's correlation (0 where one side is constant)."""
    error = predictions - targets
    return {
        "loss": float((error**2).mean()),
        "mae": float(np.abs(error).mean()),
        "pearson": _correlation(stats.pearsonr, predictions, targets),
        "spearman": _correlation(stats.spearmanr, predictions, targets),
    }


def confusion(guesses: Sequence[int], labels: Sequence[int], classes: int) -> list[list[int]]:
    """Counts, one row a true class, one column a predicted one."""
    return metrics.confusion_matrix(labels, guesses, labels=list(range(classes))).tolist()


def _correlation(kind: Callable[..., Any], a: np.ndarray, b: np.ndarray) -> float:
    constant = len(a) < 2 or a.std() == 0 or b.std() == 0
    return 0.0 if constant else float(kind(a, b).statistic)
