"""Regular expressions from an adapter's config, tried where they can be stopped.

A pattern such as `(a+)+$` takes longer than the universe to fail on forty letters, and nothing stops Python's `re`
once it runs. So expressions that repeat something are first run over the model's paths in a process of their own, for
a second or two.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from adapters_kit.errors import ShippingError

SECONDS = 5.0
_LONGEST = 5000  # characters of one expression
_CODE = """
import json, re, sys
patterns, paths = json.load(sys.stdin)
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    compiled = [re.compile(pattern), re.compile(r"(.*\\.)?(" + pattern + ")$")]
    for path in paths:
        for each in compiled:
            each.fullmatch(path)
print("done", flush=True)
"""


def expressions(config: Mapping[str, Any]) -> list[str]:
    """The regular expressions of an adapter's config: its targets given as one text, and the keys of its patterns."""
    found = [config.get(key) for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")]
    for key in ("rank_pattern", "alpha_pattern"):
        found += config.get(key) or {}
    return [text for text in found if isinstance(text, str)]


def check_patterns(config: Mapping[str, Any], paths: Iterable[str]) -> None:
    """Refuse expressions that are no such, or that take too long on these paths.

    Args:
        config: the parsed `adapter_config.json`.
        paths: of the base model's modules.

    Raises:
        ShippingError: naming the expression.
    """
    suspects = [text for text in expressions(config) if any(sign in text for sign in "*+{?(")]
    for text in suspects:
        if len(text) > _LONGEST:
            raise ShippingError(f"The adapter's config has an expression of {len(text):,} characters: {text[:60]!r} …")
    if not suspects:
        return
    given = json.dumps([suspects, sorted(set(paths))])
    try:
        run = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CODE], input=given, capture_output=True, text=True, timeout=SECONDS
        )
        reached, error = run.stdout.split(), run.stderr.strip().splitlines()
    except subprocess.TimeoutExpired as stopped:
        reached, error = (stopped.stdout or b"0").decode().split(), []
    if reached[-1:] == ["done"]:
        return
    guilty = suspects[int(reached[-1])] if reached else suspects[0]
    reason = error[-1] if error else f"it was not done with the model's paths after {SECONDS:g} seconds"
    raise ShippingError(
        f"The adapter's config names its modules by the expression {guilty[:200]!r}, which cannot be used: {reason}. "
        "Write the modules' names as a list instead."
    )
