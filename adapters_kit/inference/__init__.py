"""A run, an adapter or a plain model on new rows: scores, answers, files of answers, a chat, a server."""

from adapters_kit.inference.answers import evaluate, generates, predict, stream
from adapters_kit.inference.subject import describe

__all__ = ["describe", "evaluate", "generates", "predict", "stream"]
