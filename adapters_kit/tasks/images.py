"""Pictures as files, bytes, base64 or PIL images: opened as they are meant to be seen, in 8-bit RGB."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from adapters_kit.errors import DataError, MissingPackageError

_LARGEST = 178_956_970  # pixels, where pillow itself refuses; 512 MiB in RGB
_LONGEST_PATH = 1000  # characters; a system that is asked about a longer one raises
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
# What a complete file of a kind ends with; a picture that a download cut off lacks it.
_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}


def open_image(value: Any, row: int) -> Any:
    """A path, {"bytes": ...}, bytes, their base64 or a PIL image as an RGB image.

    Turned as its EXIF data says; 16-bit and floating-point pixels are scaled to 8 bits, not clipped; transparent ones
    are laid on white; of several frames the first counts.

    Raises:
        DataError: none of these, a file that is no image, is cut off, or would not fit in memory; by its row.
    """
    try:
        from PIL import ImageOps
    except ImportError as error:
        raise MissingPackageError("Images need pillow: pip install pillow") from error
    picture = _opened(value, row)
    try:
        return _rgb(ImageOps.exif_transpose(picture))
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise whatever the damage leads them to
        raise DataError(f"Row {row + 1}: {_name(value)} is no image that can be read ({error}).") from error


def check_image(value: Any, row: int) -> None:
    """Looks at the head and the end of a picture's file: refuses one that is missing, no image, too large or cut off.

    Raises:
        DataError: by its row.
    """
    _opened(value, row)
    source = _source(value)
    content = source if isinstance(source, bytes) else None
    if isinstance(source, str):
        with open(source, "rb") as file:
            begin = file.read(2)
            file.seek(0, io.SEEK_END)
            file.seek(max(file.tell() - 65536, 0))
            content = begin + file.read()
    end = _ENDS.get(content[:2]) if content else None
    if content and end is not None and end not in content[2:][-65536:]:
        raise DataError(
            f"Row {row + 1}: {_name(value)} ends too early: the file was cut off. Fetch it again, or leave it out."
        )


def size_of(value: Any, row: int) -> tuple[int, int]:
    """Width and height of a picture as `open_image` turns it, from its head."""
    picture = _opened(value, row)
    width, height = picture.size
    turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # orientations on their side
    return (height, width) if turned else (width, height)


def _opened(value: Any, row: int) -> Any:
    from PIL import Image

    source = _source(value)
    if source is None:
        raise DataError(f"Row {row + 1} has no image. Give it one, or leave the row out.")
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    if isinstance(source, str) and (len(source) > _LONGEST_PATH or not Path(source).is_file()):
        raise DataError(
            f"Row {row + 1}: no image file {source!r:.200}. "
            + (
                "An address is not fetched: save the pictures as files first, and name these."
                if "://" in source
                else "A path begins at the folder of the table, or where you stand, and has its suffix (.jpg, .png …)."
            )
        )
    try:
        picture: Any = Image.open(source) if isinstance(source, str | io.BytesIO) else source
        width, height = picture.size
    except Image.DecompressionBombError as error:
        raise DataError(f"Row {row + 1}: {_name(value)} is too large an image to open ({error}).") from None
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise DataError(f"Row {row + 1}: {_name(value)} is no image that can be read ({error}).") from error
    if width * height > _LARGEST or not width * height:
        raise DataError(
            f"Row {row + 1}: {_name(value)} has {width:,} × {height:,} pixels; {_LARGEST:,} are the most that is "
            "opened."
        )
    return picture


def _source(value: Any) -> Any:
    """What a picture is read from: a path, its bytes, or itself."""
    source = value.get("bytes") or value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(source, str):
        return source
    if source.startswith("file://"):
        return unquote(urlsplit(source).path)
    data = source.partition(",")[2] if source.startswith("data:image/") else source
    if data is source and (len(source) < 200 or not _BASE64.fullmatch(source)):
        return source
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        return source


def _name(value: Any) -> str:
    if isinstance(value, Mapping):
        return repr(value.get("path") or "the image")
    return (
        repr(value)[:200] if isinstance(value, str) else "the image" if isinstance(value, bytes) else f"{value!r:.80}"
    )


def _rgb(picture: Any) -> Any:
    """8-bit RGB of any mode."""
    from PIL import Image

    mode = picture.mode
    if mode.startswith("I") or mode == "F":  # 16 or 32 bits a pixel, whose conversion by pillow clips at 255
        pixels = np.asarray(picture, dtype=np.float64)
        top = 65535.0 if mode != "F" else 1.0
        if pixels.max(initial=0.0) > top:
            top = 255.0 if mode == "F" and pixels.max() <= 255 else float(pixels.max())
        scaled = np.clip(pixels / top * 255, 0, 255).round().astype(np.uint8)
        return Image.fromarray(scaled, mode="L").convert("RGB")
    if "A" in mode or "a" in mode or "transparency" in picture.info:
        full = picture.convert("RGBA")
        white = Image.new("RGBA", full.size, "white")
        return Image.alpha_composite(white, full).convert("RGB")
    return picture.convert("RGB")
