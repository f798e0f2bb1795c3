"""A tokenizer's chat template, rendered within limits.

A template comes with a model, from anybody. transformers runs it in jinja's sandbox: it can reach nothing. It could
still take for ever, or all memory: loops inside loops, `9**9**9`, texts that double. What cannot be stopped once it
runs is refused by a look at the template; what Python can interrupt is stopped by a watchman.
"""

import ctypes
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import psutil

from adapters_kit.errors import ModelError

SECONDS = 5.0
"""CPU time of one rendering; a long conversation takes some hundredths."""
BYTES = 1 << 30
"""What one rendering may add to the process's memory."""
_EVERY = 0.05
_LONGEST = 1_000_000  # characters; the longest templates of known models have some 20,000
_LARGEST = 10_000_000  # numbers written in a template are below
_FACTOR = 1000  # so many times a text may be repeated at once
_WIDTH = re.compile(r"%[^a-zA-Z%]*\d{7,}|\{[^}]*:[^}]*\d{7,}")


class _Stopped(Exception):
    """What the watchman raises inside a rendering."""


def render(tokenizer: Any, turns: list[Any], *, tools: Any = None, prompt: bool = False) -> str:
    """A conversation as the tokenizer's chat template writes it.

    Args:
        turns: messages, as `apply_chat_template` takes them.
        prompt: up to where the assistant's answer begins.

    Raises:
        ModelError: the template would not end, or would take all memory.
        Exception: whatever the template raises.
    """
    with limited(tokenizer):
        return str(tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=prompt))


@contextmanager
def limited(tokenizer: Any) -> Iterator[None]:
    """Inside, the tokenizer's template may be rendered, for some seconds and within some memory.

    Raises:
        ModelError: it needs more.
    """
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        _check(str(template or ""))
    me, name = threading.get_ident(), getattr(tokenizer, "name_or_path", "") or "the tokenizer"
    _watch(me)
    try:
        yield
    except _Stopped:
        raise _refusal(name, f"was not done after {SECONDS:g} seconds, or took {BYTES >> 30} GiB") from None
    finally:
        _leave(me)


def _refusal(name: str, what: str) -> ModelError:
    return ModelError(
        f"The chat template of {name} {what}: it is broken, or means harm. Write another into chat_template.jinja."
    )


@lru_cache(maxsize=64)
def _check(template: str) -> None:
    """Refuse what Python could not interrupt: powers, and products that make huge numbers and texts in one step."""
    from jinja2 import nodes
    from transformers.utils import chat_template_utils

    if len(template) > _LONGEST:
        raise _refusal("the tokenizer", f"has {len(template):,} characters")
    try:
        tree = chat_template_utils._compile_jinja_template("").environment.parse(template)
        found = list(tree.find_all((nodes.Pow, nodes.Mul, nodes.Const)))
    except Exception:  # a template that is none: told by whoever renders it
        return
    for node in found:
        if isinstance(node, nodes.Pow):
            raise _refusal("the tokenizer", "raises numbers to powers")
        if isinstance(node, nodes.Mul) and not (_is_small(node.left) or _is_small(node.right)):
            raise _refusal("the tokenizer", f"multiplies by what may be more than {_FACTOR:,}")
        if isinstance(node, nodes.Const) and _is_huge(node.value):
            raise _refusal("the tokenizer", f"names a size of {_LARGEST:,} or more ({str(node.value)[:40]!r})")


def _is_small(node: Any) -> bool:
    value = getattr(node, "value", None)  # of a constant
    return isinstance(value, int | float) and abs(value) <= _FACTOR


def _is_huge(value: Any) -> bool:
    if isinstance(value, str):
        return _WIDTH.search(value) is not None
    return isinstance(value, int | float) and not abs(value) < _LARGEST


# The watchman: one thread while anything is rendered ------------------------------------------------------------------

_lock = threading.Lock()
_rendering: dict[int, "_Rendering"] = {}  # by thread
_watchman: threading.Thread | None = None


@dataclass
class _Rendering:
    """What the watchman knows of a thread that renders."""

    clock: Callable[[], float]
    end: float
    most: int | None = None  # bytes of the process; reckoned when the watchman first sees it
    stopped: bool = False


def _watch(thread: int) -> None:
    global _watchman
    clock = _clock(thread)
    with _lock:
        _rendering[thread] = _Rendering(clock, clock() + SECONDS)
        if _watchman is None or not _watchman.is_alive():  # none yet, or this process was forked
            _watchman = threading.Thread(target=_stand_watch, name="adapters_kit-templates", daemon=True)
            _watchman.start()


def _leave(thread: int) -> None:
    with _lock:
        if _rendering.pop(thread).stopped:  # if it has not come yet, it must not come later
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)


def _stand_watch() -> None:
    global _watchman
    idle = 0
    while True:
        time.sleep(_EVERY)
        with _lock:
            idle = 0 if _rendering else idle + 1
            if idle > 200:  # ten seconds
                _watchman = None
                return
            held = psutil.Process().memory_info().rss if _rendering else 0
            for thread, one in _rendering.items():
                one.most = one.most or held + BYTES
                if not one.stopped and (one.clock() > one.end or held > one.most):
                    one.stopped = True
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Stopped))


def _clock(thread: int) -> Callable[[], float]:
    """The CPU time of a thread, so that a busy machine stops nobody; where the system has none, the time of day."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    number = time.pthread_getcpuclockid(thread)
    return lambda: time.clock_gettime(number)
