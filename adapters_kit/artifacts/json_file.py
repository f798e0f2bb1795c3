"""JSON from files that somebody else may have written: what is wrong is said with the file's name."""

import json
from pathlib import Path
from typing import Any

from adapters_kit.errors import ShippingError

LARGEST = 256 << 20  # bytes; tokenizers reach 30 MB


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ShippingError: it cannot be read, is no plain file, too large, not UTF-8, not JSON, nested too deeply, or not an
            object.
    """
    value = _parsed(_text(Path(path)), str(path))
    if not isinstance(value, dict):
        raise ShippingError(f"{path} is not a JSON object.")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, one a line; empty lines are none.

    Raises:
        ShippingError: as `read_json`, or a line that is no object, by its number.
    """
    found = []
    for number, line in enumerate(_text(Path(path)).split("\n"), 1):
        if line.strip():
            value = _parsed(line, f"{path}, line {number}")
            if not isinstance(value, dict):
                raise ShippingError(f"{path}, line {number} is not a JSON object.")
            found.append(value)
    return found


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise ShippingError(f"{path} is not a plain file.")
        if path.stat().st_size > LARGEST:
            raise ShippingError(f"{path} has {path.stat().st_size:,} bytes, which no such file needs.")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ShippingError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ShippingError(f"{path} is not UTF-8 text (byte {error.start}).") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ShippingError(f"{where} is not valid JSON ({str(error)[:200]}).") from None
