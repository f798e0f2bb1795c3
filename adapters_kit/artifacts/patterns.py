"""Regular expressions that name modules, an adapter's or the user's own, tried where they can be stopped.

A pattern such as `(a+)+$` takes longer than the universe to fail on forty letters, and nothing stops Python's `re`
once it runs. So expressions that repeat something are first run over the model's paths in a process of their own, for
a few seconds and within some memory.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from adapters_kit.errors import ShippingError

SECONDS = 5.0
_LONGEST = 5000  # characters of one expression
_CODE = r"""
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
except (ImportError, ValueError, OSError):
    pass
patterns, paths = json.load(sys.stdin)
for number, (form, pattern) in enumerate(patterns):
    print(number, flush=True)
    try:
        re.compile(pattern)
        compiled = re.compile(form % pattern)
    except re.error as error:
        sys.exit(f"it is not a regular expression: {error}")
    for path in paths:
        compiled.search(path)
print("done", flush=True)
"""
_FORMS = {
    **dict.fromkeys(("target_modules", "exclude_modules", "feedforward_modules"), r"\A(?:%s)\Z"),
    "layers_pattern": r"\A.*\.%s\.(\d+)\.",
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), r"\A(.*\.)?(%s)$"),
    "reduction_factor": r"(^|\.)(?:%s)(\.|$)",
}
"""The options that are matched with paths, and within what."""


def expressions(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The regular expressions of a peft config, each behind its form: a text alone, and the keys of tables."""
    found = []
    for key, form in _FORMS.items():
        value = config.get(key)
        texts = list(value) if isinstance(value, Mapping) else [value]
        found += [(form, text) for text in texts if isinstance(text, str)]
    parts = config.get("parts")  # of several methods together
    inner = [part for part in parts.values() if isinstance(part, Mapping)] if isinstance(parts, Mapping) else []
    return found + [pair for part in inner for pair in expressions(part)]


def unusable(config: Mapping[str, Any], paths: Iterable[str]) -> str | None:
    """What is wrong with an expression: it is none, or takes too long on these paths. None if nothing is.

    Args:
        config: the fields of a peft config.
        paths: of the base model's modules.
    """
    suspects = [pair for pair in expressions(config) if any(sign in pair[1] for sign in "*+{?(")]
    for _, text in suspects:
        if len(text) > _LONGEST:
            return f"{text[:60]!r} … cannot be used: it has {len(text):,} characters"
    if not suspects:
        return None
    given = json.dumps([suspects, sorted(set(paths))])
    try:
        run = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CODE], input=given, capture_output=True, text=True, timeout=SECONDS
        )
        reached, error = run.stdout.split(), run.stderr.strip().splitlines()
    except subprocess.TimeoutExpired as stopped:
        reached, error = (stopped.stdout or b"0").decode().split(), []
    if reached[-1:] == ["done"]:
        return None
    _, guilty = suspects[int(reached[-1])] if reached else suspects[0]
    reason = error[-1] if error else f"it was not done with the model's paths after {SECONDS:g} seconds"
    return f"{guilty[:200]!r} cannot be used: {reason}"


def check_patterns(config: Mapping[str, Any], paths: Iterable[str]) -> None:
    """Refuse an adapter's expressions that are no such, or that take too long on these paths.

    Args:
        config: the parsed `adapter_config.json`.
        paths: of the base model's modules.

    Raises:
        ShippingError: naming the expression.
    """
    if (found := unusable(config, paths)) is not None:
        raise ShippingError(
            f"In the adapter's config the expression {found}. Write the modules' names as a list instead."
        )
