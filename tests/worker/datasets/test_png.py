from __future__ import annotations

import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from worker.datasets.png import png_bytes


def pixels_of(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with Image.open(BytesIO(data)) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize("shape", [(8, 8), (5, 9, 3), (1, 1), (32, 32, 3)])
def test_a_stored_png_shows_the_same_pixels(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(pixels_of(png_bytes(pixels)), pixels)


def test_a_stored_png_is_not_compressed() -> None:
    data = png_bytes(np.zeros((32, 32, 3), np.uint8))
    assert len(data) > 32 * 32 * 3
    assert zlib.decompress(data[41:-16]) == bytes(32 * 97)
