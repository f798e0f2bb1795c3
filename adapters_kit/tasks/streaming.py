"""Generated text while it is being generated: an iterator over pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from transformers import StoppingCriteriaList, TextStreamer

from adapters_kit.tasks.generation import without_empty_thinking


class _Pieces(TextStreamer):
    """Hands on what is certain of the text: everything up to the last complete word."""

    def __init__(self, tokenizer: Any, queue: SimpleQueue) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.queue = queue

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.queue.put(text)


def answer(texts: Iterator[str]) -> Iterator[str]:
    """The pieces without an empty block of thinking at their beginning, as a whole answer is given too."""
    waiting, begun = "", False
    for text in texts:
        if begun:
            yield text
            continue
        waiting += text
        so_far = "".join(waiting.split())
        begun = not any(block.startswith(so_far) for block in ("<think></think>", "</think>"))
        if begun:
            yield without_empty_thinking(waiting)
    if not begun and (rest := without_empty_thinking(waiting)):
        yield rest


def pieces(tokenizer: Any, generate: Callable[..., Any]) -> Iterator[str]:
    """The text that `generate` makes for one prompt, piece by piece; joined, they are the whole answer.

    Generation runs in a thread, which ends early when the caller stops asking. What it raises is raised here.

    Args:
        generate: called with `streamer` and `stopping_criteria`, both for `model.generate`. It runs in another thread,
            so that contexts such as `no_grad` have to be entered inside.
    """
    queue: SimpleQueue[str | BaseException | None] = SimpleQueue()
    enough = Event()

    def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), enough.is_set(), device=ids.device, dtype=torch.bool)

    def work() -> None:
        try:
            generate(streamer=_Pieces(tokenizer, queue), stopping_criteria=StoppingCriteriaList([stop]))
            queue.put(None)
        except BaseException as error:
            queue.put(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        while (piece := queue.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        enough.set()
        thread.join()
