"""A base's config.json may come from anybody: its numbers are looked at before transformers builds what they say.

Layers, experts and heads are made one by one, so that a count of millions takes forever and no shape is ever compared;
positions and labels take memory that no weight has to fill.
"""

import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapters_kit.artifacts.json_file import read_json
from adapters_kit.errors import AdapterError, ShippingError, gist

# Which keys count what; the first that fits, and a key that fits none may be anything. The largest models have some 200
# layers, 600 experts and 10 million positions.
_MOST: tuple[tuple[re.Pattern[str], float], ...] = (
    (re.compile(r"token|_idx|seed|theta|freq|period|interval|length"), float("inf")),
    (re.compile(r"label"), 10**6),
    (re.compile(r"position|window|size|dim|vocab|^d_|^ctx|^n_(ctx|embd|positions)"), 1 << 31),
    (re.compile(r"layer|block|depth|stage|loops|repeat"), 4096),
    (re.compile(r"expert|heads?$|head_count|^n_head|groups|codebooks"), 10**5),
    (re.compile(r""), float("inf")),
)
_LONGEST = 10**6  # entries of a list or table


def check_config(raw: Any, where: str, error: type[AdapterError], path: str = "") -> None:
    """Refuse counts and sizes that no model has, and names of architectures that are none.

    Args:
        raw: the config as JSON has it, with configs inside it.
        where: the file, for the message.

    Raises:
        AdapterError: of the type given, naming the key.
    """
    if isinstance(raw, Mapping | list) and len(raw) > _LONGEST:
        raise error(f"{where}: {path or 'it'} has {len(raw):,} entries, which no model's config has.")
    if isinstance(raw, Mapping):
        names = raw.get("architectures")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise error(f"{where}: architectures is {str(names)[:80]!r}, where a list of names belongs.")
        for key, value in raw.items():
            check_config(value, where, error, str(key))
    elif isinstance(raw, list):
        for value in raw:
            check_config(value, where, error, path)
    elif isinstance(raw, int | float) and not isinstance(raw, bool):
        most = next(limit for pattern, limit in _MOST if pattern.search(path))
        if isinstance(raw, int) and abs(raw) > most:
            raise error(f"{where}: {path} is {raw if abs(raw) < 10**30 else '10^30 or more'}, which no model has.")


def read_base_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model's folder.

    Raises:
        ShippingError: none there that can be read, or numbers that no model has.
    """
    raw = read_json(folder / "config.json")
    check_config(raw, str(folder / "config.json"), ShippingError)
    return raw


@contextmanager
def read_as_model(name: str, error: type[AdapterError]) -> Iterator[None]:
    """Inside, transformers makes a model of a config and of weights; whatever it stumbles over becomes one sentence.

    Raises:
        AdapterError: of the type given. Errors of ours pass.
    """
    try:
        yield
    except (AdapterError, MemoryError):
        raise
    except pickle.UnpicklingError as found:
        raise error(
            f"The weights of {name} are a pickle that needs to run code to load, which could do anything. It was not "
            "loaded: ask for them as safetensors."
        ) from found
    except (OSError, ValueError, RuntimeError) as found:
        raise error(f"Cannot load {name}: {gist(found)}") from found
    except Exception as found:  # KeyError, ZeroDivisionError …: what values that do not belong there provoke
        raise error(
            f"Cannot load {name}: its config makes no model ({type(found).__name__}: {gist(found)})."
        ) from found
