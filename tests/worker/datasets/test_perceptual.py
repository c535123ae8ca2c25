from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

from worker.datasets import perceptual
from worker.datasets.perceptual import (
    UInt64,
    grey_square,
    max_distance,
    near_pairs,
    perceptual_hashes,
)


def photos(count: int, side: int = 64) -> list[Image.Image]:
    """Smooth noise with structure at several scales, as photos have it."""
    generator = np.random.default_rng(0)
    made = []
    for _ in range(count):
        layers = [
            Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).resize(
                (side, side), Image.Resampling.BICUBIC
            )
            for size in (3, 6, 12)
        ]
        image = Image.blend(Image.blend(layers[0], layers[1], 0.45), layers[2], 0.25)
        made.append(image.filter(ImageFilter.GaussianBlur(0.5)))
    return made


def hashes_of(pictures: list[Image.Image]) -> UInt64:
    return perceptual_hashes(np.stack([grey_square(picture) for picture in pictures]))


def as_jpeg(picture: Image.Image) -> Image.Image:
    file = BytesIO()
    picture.save(file, "JPEG", quality=60)
    return Image.open(BytesIO(file.getvalue())).convert("RGB")


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "compressed": as_jpeg,
    "halved": lambda picture: picture.resize((32, 32)),
    "doubled": lambda picture: picture.resize((128, 128)),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.1),
    "grey": lambda picture: picture.convert("L").convert("RGB"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_has_nearly_the_same_hash(change: str) -> None:
    originals = photos(40)
    distances = np.bitwise_count(
        hashes_of(originals) ^ hashes_of([CHANGES[change](picture) for picture in originals])
    )
    assert (distances <= 7).all()


def test_different_pictures_have_different_hashes() -> None:
    hashes = hashes_of(photos(60))
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None])
    assert distances[~np.eye(60, dtype=bool)].min() > 7


def test_the_mean_brightness_does_not_enter() -> None:
    square = grey_square(photos(1)[0]) // 2
    same, brighter = perceptual_hashes(np.stack([square, square + 100]))
    assert same == brighter


def brute_force(hashes: UInt64, distance: int) -> list[list[int]]:
    return [
        [i, j]
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if int(hashes[i] ^ hashes[j]).bit_count() <= distance
    ]


@settings_of_hypothesis(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=0, max_size=8),
    flips=st.lists(st.lists(st.integers(0, 63), max_size=9), max_size=20),
    few=st.booleans(),
)
def test_all_near_pairs_are_found_and_no_others(
    seeds: list[int], flips: list[list[int]], few: bool
) -> None:
    values = list(seeds)
    for number, bits in enumerate(flips):
        value = seeds[number % len(seeds)] if seeds else 0
        for bit in bits:
            value ^= 1 << bit
        values.append(value)
    hashes = np.array(values, np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        if not few:
            patch.setattr(perceptual, "FEW", -1)
        assert max_distance(len(hashes)) == (7 if few else 3)
        found = near_pairs(hashes).tolist()
        assert found == brute_force(hashes, max_distance(len(hashes)))


def test_very_many_equal_hashes_take_bounded_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "MAX_COMPARISONS", 8 * 1000 * 5)
    pairs = near_pairs(np.zeros(1000, np.uint64))
    assert 0 < len(pairs) <= 1000 * 6
    assert near_pairs(np.zeros(1, np.uint64)).shape == (0, 2)
