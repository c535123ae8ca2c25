"""The layouts that are told apart, in the order in which they are looked for."""

from __future__ import annotations

from worker.datasets.layout import Layout, Listing, find_class_folders
from worker.datasets.stl10 import find_stl10
from worker.datasets.tinyimagenet import find_tinyimagenet


def find_layout(listing: Listing) -> Layout:
    """The layout of a tree: that of a published dataset where its own files are there, else class
    folders.

    Raises:
        TrainingError: `bad_layout` for a published dataset whose files do not fit together.
    """
    return find_tinyimagenet(listing) or find_stl10(listing) or find_class_folders(listing.folders)
