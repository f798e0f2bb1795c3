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


def agreement(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """How two lists of numbers go together: by rank (Spearman) and by size (Pearson); 0 where one is constant."""
    return {
        "spearman": _correlation(stats.spearmanr, found, wanted),
        "pearson": _correlation(stats.pearsonr, found, wanted),
    }


class Rankings:
    """Scores of lists of documents, one list a query. A document that is not relevant and as high as one that is stands
    before it: a model that gives all the same number finds nothing."""

    def __init__(self) -> None:
        self._found: list[tuple[float, float, float, float]] = []

    def add(self, scores: np.ndarray, relevant: np.ndarray) -> None:
        """One query: what the model gives each document, and how relevant each is (0: not at all); (documents,)."""
        order = np.lexsort((relevant, -scores))
        gains = relevant[order]
        discounts = 1 / np.log2(np.arange(2, min(len(gains), 10) + 2))
        best = np.sort(relevant)[::-1]
        first = int(np.flatnonzero(gains > 0)[0]) + 1
        ndcg = float(gains[:10] @ discounts) / float(best[:10] @ discounts)
        self._found.append((ndcg, 1 / first if first <= 10 else 0.0, float(first == 1), float(first <= 5)))

    def __len__(self) -> int:
        return len(self._found)

    def means(self) -> dict[str, float]:
        """Discounted cumulative gain of the first ten against the best there can be (Jaervelin and Kekaelaeinen 2002),
        reciprocal rank, and the part of the queries with a relevant document first, or among the first five."""
        names = ("ndcg@10", "mrr@10", "accuracy@1", "accuracy@5")
        return dict(zip(names, np.mean(self._found, axis=0).tolist(), strict=True))


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Area under precision against recall, over all pairs of a query and a document."""
    return float(metrics.average_precision_score(relevant > 0, scores))


def confusion(guesses: Sequence[int], labels: Sequence[int], classes: int) -> list[list[int]]:
    """Counts, one row a true class, one column a predicted one."""
    return metrics.confusion_matrix(labels, guesses, labels=list(range(classes))).tolist()


def _correlation(kind: Callable[..., Any], a: np.ndarray, b: np.ndarray) -> float:
    constant = len(a) < 2 or a.std() == 0 or b.std() == 0
    return 0.0 if constant else float(kind(a, b).statistic)
