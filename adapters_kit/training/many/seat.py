"""A training that shares the machine with others: a thread that runs only while the conductor lets it.

Hugging Face's Trainer drives itself; several of them step by step need several stacks. Never do two run at once, so
nothing is locked. What is global to a process and a training draws from (random numbers) is put in its place whenever
it runs: each sees the numbers that it would see alone.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from accelerate.state import GradientState

from adapters_kit.devices import random_state, set_random_state


class Seat:
    """One training.

    Attributes:
        name: of its run.
        request: what it waits for; None while it runs.
        has_ended: whether its thread is through.
        result: what it returned.
        error: what it raised.
        alone: why it does not go through the body with the others; None while it does.
        proven: the kinds of pass (padded or not) in which its gradients were found to be its own.
    """

    def __init__(self, name: str, work: Callable[[Seat], Any]) -> None:
        self.name = name
        self.request: Any = None
        self.has_ended = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.alone: str | None = None
        self.proven: set[bool] = set()
        self.random = Randomness()
        self._answer: Any = None
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, args=(work,), name=name, daemon=True)
        self._thread.start()

    def _work(self, work: Callable[[Seat], Any]) -> None:
        self._go.acquire()
        try:
            self.result = work(self)
        except BaseException as error:
            self.error = error
        self.has_ended = True
        self._waits.release()

    def wait(self, request: Any) -> Any:
        """Called by the training: lets the others run until there is an answer. Raises it, if it is an error."""
        self.request = request
        self._waits.release()
        self._go.acquire()
        answer, self._answer = self._answer, None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def run(self, answer: Any = None) -> None:
        """Called by the conductor: lets the training run until it waits again, or has ended."""
        self.request, self._answer = None, answer
        with self.random.all_here():
            self._go.release()
            self._waits.acquire()


class Randomness:
    """The state of every global generator, and of accelerate's accumulation, as one training has them."""

    def __init__(self) -> None:
        self._torch, self._others = random_state(), _other_states()

    @contextmanager
    def all_here(self) -> Iterator[None]:
        """In the block, numbers are drawn from this state."""
        outer = _other_states()
        _set_others(self._others)
        try:
            with self.here():
                yield
        finally:
            self._others = _other_states()
            _set_others(outer)

    @contextmanager
    def here(self) -> Iterator[None]:
        """The same for torch alone, which is quick."""
        outer = random_state()
        set_random_state(self._torch)
        try:
            yield
        finally:
            self._torch = random_state()
            set_random_state(outer)


def _other_states() -> tuple[Any, Any, dict[str, Any]]:
    # accelerate keeps in one place for the whole process whether the step that is made ends an accumulation.
    return random.getstate(), np.random.get_state(), dict(GradientState().__dict__)


def _set_others(state: tuple[Any, Any, dict[str, Any]]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    shared = GradientState().__dict__
    shared.clear()
    shared.update(state[2])
