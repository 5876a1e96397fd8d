"""Pictures from anywhere are the pixels that PIL saved; hostile files (`sources.py`) are refused undecoded.

Seen to fail: the orientation left out, 16 bits cut off, the size looked at after decoding, a link followed.
"""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from headwater.lens.errors import PromptError
from headwater.lens.media.pictures import picture

RED = np.zeros((4, 6, 3), np.uint8)
RED[0, 0] = 255, 0, 0


def saved(image, kind, **more):
    into = io.BytesIO()
    image.save(into, kind, **more)
    return into.getvalue()


def bomb(side):
    """A PNG of a few bytes whose header promises side × side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def test_every_form_is_the_same_pixels(tmp_path):
    image = Image.fromarray(RED)
    for kind in ("PNG", "BMP", "GIF", "TIFF"):
        assert (np.asarray(picture(saved(image, kind))) == RED).all(), kind
    (tmp_path / "a.jpg").write_bytes(saved(image, "PNG"))  # told by its content
    for given in (image, RED, torch.from_numpy(RED).permute(2, 0, 1), RED / 255.0, tmp_path / "a.jpg"):
        assert (np.asarray(picture(given)) == RED).all()


def test_orientation_and_depth_are_read():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    assert picture(saved(Image.fromarray(RED), "JPEG", exif=exif)).size == (4, 6)
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert np.asarray(picture(saved(deep, "PNG")))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("side", [9000, 12000, 40000])
def test_bombs_are_refused_before_they_are_decoded(side, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(PromptError, match="pixels"):
        picture(bomb(side))


def test_what_is_no_picture_is_refused(tmp_path):
    whole = saved(Image.fromarray(np.arange(30000).reshape(100, 100, 3).astype(np.uint8)), "PNG")
    for data, told in ((b"<svg/>", "SVG"), (b"", "no picture"), (whole[: len(whole) // 2], "broken")):
        with pytest.raises(PromptError, match=told):
            picture(data)
    (tmp_path / "whole.png").write_bytes(whole)
    (tmp_path / "link.png").symlink_to(tmp_path / "whole.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, told in (("link.png", "is a link"), ("pipe.png", "plain file"), ("no.png", "No such file")):
        with pytest.raises(PromptError, match=told):
            picture(tmp_path / name)
    with pytest.raises(PromptError, match="plain file"):
        picture("/dev/zero")
    with pytest.raises(PromptError, match="from 0 to 1"):
        picture(np.full((3, 4, 4), -2.0))


def test_brightness_of_many_bits_keeps_its_scale() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    assert sixteen.mode == "I;16"
    for given in (
        sixteen, Image.fromarray(grey).convert("I"), Image.fromarray(grey).convert("F"),
        Image.fromarray(grey.astype(np.float32) / 255), torch.from_numpy(grey / np.float32(255)).requires_grad_(),
    ):  # fmt: skip
        assert (np.asarray(picture(given))[..., 0] == grey).all()
    half = torch.from_numpy(grey / np.float32(255)).bfloat16()
    assert np.abs(np.asarray(picture(half))[..., 0].astype(int) - grey).max() <= 1
    for odd in (
        np.full((2, 2), 300, np.float32),
        np.full((2, 2), np.nan, np.float32),
        np.full((2, 2), -1, np.int32),
    ):
        with pytest.raises(PromptError, match="scale is unknown"):
            picture(Image.fromarray(odd))
