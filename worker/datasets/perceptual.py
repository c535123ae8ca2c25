"""A hash of what a picture looks like, and the pairs of pictures that look alike.

The hash says by a bit for each of the lowest frequencies of the picture's discrete cosine transform
whether it is above their median (pHash; C. Zauner, "Implementation and Benchmarking of Perceptual
Image Hash Functions", 2010). Another size, compression or brightness turns few bits over.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.Image import Resampling

UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]

SIDE = 32
NUM_FREQUENCIES = 8
"""In each direction; the constant part of the picture is left out."""
FEW = 2**17
"""Up to so many hashes are compared in eight bands of eight bits, more in four of sixteen."""
MAX_COMPARISONS = 2**30
"""Of one search, a few seconds' worth: it bounds the work when very many pictures are alike."""


def _cosines() -> npt.NDArray[np.float32]:
    """float32 [8, 32]: the lowest frequencies over a line of 32 pixels (DCT-II)."""
    frequency, place = np.mgrid[:NUM_FREQUENCIES, :SIDE]
    angles = np.pi * frequency * (2 * place + 1) / (2 * SIDE)
    return np.asarray(np.cos(angles), np.float32)


_COSINES = _cosines()
_BITS = np.uint64(1) << np.arange(64, dtype=np.uint64)


def grey_square(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 [32, 32]: the whole picture's brightness."""
    return np.asarray(picture.convert("L").resize((SIDE, SIDE), Resampling.BILINEAR))


def perceptual_hashes(squares: npt.NDArray[np.uint8]) -> UInt64:
    """uint64 [N] of pictures as `grey_square` makes them, uint8 [N, 32, 32]."""
    frequencies = _COSINES @ squares.astype(np.float32) @ _COSINES.T
    values = frequencies.reshape(-1, 64)
    medians = np.median(values[:, 1:], axis=1, keepdims=True)
    is_above = values > medians
    is_above[:, 0] = False
    hashes: UInt64 = (is_above * _BITS).sum(axis=1, dtype=np.uint64)
    return hashes


def max_distance(num_hashes: int) -> int:
    """In how many bits hashes may differ for `near_pairs` to find them among so many."""
    return _num_bands(num_hashes) - 1


def _num_bands(num_hashes: int) -> int:
    return 8 if num_hashes <= FEW else 4


def near_pairs(hashes: UInt64) -> Int64:
    """int64 [M, 2]: the pairs i < j of hashes (uint64 [N]) that differ in at most
    `max_distance(N)` bits, in their order.

    Such hashes are equal in one of one band more than that, so only those are compared that share
    a band's value. All of them, unless that were more than `MAX_COMPARISONS`: then each is compared
    with those that are next to it by value.
    """
    if len(hashes) < 2:
        return np.empty((0, 2), np.int64)
    num_bands = _num_bands(len(hashes))
    found = [
        pairs for band in range(num_bands) for pairs in _pairs_of_band(hashes, band, num_bands)
    ]
    if not found:
        return np.empty((0, 2), np.int64)
    return np.unique(np.concatenate(found), axis=0)


def _pairs_of_band(hashes: UInt64, band: int, num_bands: int) -> Iterator[Int64]:
    """Pairs that agree in the band's bits and are near."""
    # By the band's value, and then by the other bits: neighbours are most alike.
    width = np.uint64(64 // num_bands)
    turn = width * np.uint64(band)
    keys = hashes << turn | hashes >> (np.uint64(64) - turn) if band else hashes
    order = np.argsort(keys, kind="stable")
    values = (keys[order] >> (np.uint64(64) - width)).astype(np.uint16)
    in_order = hashes[order]
    max_gap = MAX_COMPARISONS // (num_bands * len(hashes)) + 1
    for gap in range(1, min(max_gap + 1, len(hashes))):
        agree = np.flatnonzero(values[gap:] == values[:-gap])
        if not len(agree):
            return
        differing = np.bitwise_count(in_order[agree] ^ in_order[agree + gap])
        near = agree[differing < num_bands]
        pairs = np.stack([order[near], order[near + gap]], axis=1)
        yield np.sort(pairs, axis=1)
