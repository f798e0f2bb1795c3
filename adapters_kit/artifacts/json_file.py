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
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ShippingError(f"{path} is not a plain file.")
        if path.stat().st_size > LARGEST:
            raise ShippingError(f"{path} has {path.stat().st_size:,} bytes, which no such file needs.")
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ShippingError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ShippingError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ShippingError(f"{path} is not valid JSON ({str(error)[:200]}).") from None
    if not isinstance(value, dict):
        raise ShippingError(f"{path} is not a JSON object.")
    return value
