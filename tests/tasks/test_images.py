"""Pictures are read as they are meant to be seen, or refused by their row before training."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from adapters_kit.errors import DataError
from adapters_kit.tasks.images import check_image, open_image

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def saved(picture, kind, **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return {"bytes": out.getvalue()}


def test_a_turned_photograph_is_turned_back():
    """Every orientation of EXIF shows the same picture."""
    upright = Image.fromarray(PIXELS)
    turn = Image.Transpose
    ways = dict(enumerate([None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE], 1))
    ways |= dict(enumerate([turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270], 6))
    for tag, way in ways.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        stored = upright if way is None else upright.transpose(way)
        found = open_image(saved(stored, "PNG", exif=exif), 0)
        np.testing.assert_array_equal(np.asarray(found), PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind):
    wide = (PIXELS[..., 0].astype(np.uint16) * 257).astype(np.uint16)
    found = np.asarray(open_image(saved(Image.fromarray(wide), kind), 0))
    np.testing.assert_array_equal(found, np.repeat(PIXELS[..., :1], 3, -1))
    if kind == "TIFF":
        unit = Image.fromarray((PIXELS[..., 0] / 255).astype(np.float32))
        np.testing.assert_array_equal(np.asarray(open_image(saved(unit, kind), 0))[..., 0], PIXELS[..., 0])


def test_grey_palette_and_transparent_pictures():
    grey = Image.fromarray(PIXELS[..., 0])
    np.testing.assert_array_equal(np.asarray(open_image(saved(grey, "PNG"), 0))[..., 2], PIXELS[..., 0])
    palette = Image.fromarray(PIXELS).quantize(16)
    np.testing.assert_array_equal(np.asarray(open_image(saved(palette, "PNG"), 0)), np.asarray(palette.convert("RGB")))
    clear = np.dstack([PIXELS, np.where(np.arange(20) < 10, 0, 255)[None].repeat(12, 0)]).astype(np.uint8)
    found = np.asarray(open_image(saved(Image.fromarray(clear), "PNG"), 0))
    assert (found[:, :10] == 255).all()
    np.testing.assert_array_equal(found[:, 10:], PIXELS[:, 10:])
    assert open_image(saved(Image.fromarray(PIXELS).convert("CMYK"), "TIFF"), 0).mode == "RGB"
    assert open_image(saved(grey.convert("LA"), "PNG"), 0).mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_cut_off_pictures_are_refused(tmp_path, kind, part):
    whole = saved(Image.fromarray(np.tile(PIXELS, (8, 8, 1))), kind)["bytes"]
    path = tmp_path / "a.img"
    path.write_bytes(whole)
    check_image(str(path), 0)
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(DataError, match=r"Row 4: .*a\.img"):
        check_image(str(path), 3)
        open_image(str(path), 3)
    if kind in ("PNG", "JPEG"):  # seen without decoding
        with pytest.raises(DataError, match="cut off"):
            check_image({"bytes": whole[: int(part * len(whole))]}, 3)


def test_pictures_that_are_too_large_or_none(tmp_path):
    """A picture of 400 million pixels, which takes a hundred bytes on the disk, is not unpacked."""
    bomb = saved(Image.new("1", (8, 8)), "PNG")["bytes"]
    import struct
    import zlib

    head = b"IHDR" + struct.pack(">II", 20_000, 20_000) + bomb[24:29]
    bomb = bomb[:12] + head + struct.pack(">I", zlib.crc32(head)) + bomb[33:]
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(DataError, match=r"Row 1: .*bomb\.png"):
        check_image(str(tmp_path / "bomb.png"), 0)
    (tmp_path / "text.png").write_text("no picture")
    for value in (str(tmp_path / "text.png"), {"bytes": b"x"}, b"", 7, {"path": str(tmp_path / "none.png")}):
        with pytest.raises(DataError, match="Row 1: "):
            check_image(value, 0)


def test_pictures_written_as_text(tmp_path):
    content = saved(Image.fromarray(PIXELS), "PNG")["bytes"]
    (tmp_path / "a b.png").write_bytes(content)
    text = base64.b64encode(content).decode()
    for value in (text, f"data:image/png;base64,{text}", (tmp_path / "a b.png").as_uri()):
        check_image(value, 0)
        np.testing.assert_array_equal(np.asarray(open_image(value, 0)), PIXELS)
    with pytest.raises(DataError, match="ends too early"):
        check_image(base64.b64encode(content[:-40]).decode(), 0)


def test_what_is_no_file_says_what_is_looked_for():
    for value, told in (
        (None, "Row 3 has no image"),
        ("https://x.org/a.png", "is not fetched"),
        ("a", "has its suffix"),
    ):
        with pytest.raises(DataError, match=told):
            check_image(value, 2)
    with pytest.raises(DataError) as found:
        check_image("iVBO" * 10_000 + "-", 0)
    assert len(str(found.value)) < 400
