"""Holding out a share of the training images, the same way at ingest and at training."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int64]


def split_train(labels: Labels, val_fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Splits the images with these labels (int64 [N]) into train and val, class by class.

    Returns the indices of train and of val, both rising. The same labels, share and seed give the
    same split on every machine and version: the draws are the raw output of PCG64, which NumPy
    keeps. Val gets round(N * val_fraction) images, at least one, shared out over the classes by
    largest remainders; every class keeps at least one image in train, so that val holds fewer, or
    none, where classes are that small.
    """
    draws = np.random.PCG64(seed).random_raw(len(labels))
    in_val = np.zeros(len(labels), dtype=np.bool_)
    classes, counts = np.unique(labels, return_counts=True)
    for label, num_val in zip(classes, _share_out(counts, val_fraction), strict=True):
        members = np.flatnonzero(labels == label)
        in_val[members[np.argsort(draws[members], kind="stable")[:num_val]]] = True
    return np.flatnonzero(~in_val).astype(np.int64), np.flatnonzero(in_val).astype(np.int64)


def _share_out(counts: npt.NDArray[np.int64], fraction: float) -> npt.NDArray[np.int64]:
    """How many of each class to hold out (Hamilton's method, capped at one less than there are)."""
    quotas = counts * fraction
    shares: npt.NDArray[np.int64] = np.minimum(np.floor(quotas).astype(np.int64), counts - 1)
    missing = max(1, round(int(counts.sum()) * fraction)) - int(shares.sum())
    for place in np.argsort(shares - quotas, kind="stable"):
        if missing > 0 and shares[place] < counts[place] - 1:
            shares[place] += 1
            missing -= 1
    return shares
