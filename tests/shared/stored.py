"""Changes to stored datasets that leave everything readable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from shared.dataset_files import read_index, write_index


def change_label(folder: Path, split: str) -> None:
    """The first image of the split gets the second class."""
    index = read_index(folder)
    labels = np.array(index.splits[split].labels)
    labels[0] = 1
    write_index(
        replace(index, splits=index.splits | {split: replace(index.splits[split], labels=labels)}),
        folder,
    )


def change_classes(folder: Path, classes: list[str]) -> None:
    file = folder / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"classes": classes}))


def as_first_version(folder: Path) -> None:
    """Rewrites the index as the first version of the format had it."""
    index = read_index(folder)
    document = {
        "format_version": 1,
        "hash": index.hash,
        "classes": index.classes,
        "splits": {
            name: {
                "offsets": split.offsets.tolist(),
                "sizes": split.sizes.tolist(),
                "labels": split.labels.tolist(),
                "paths": list(split.paths),
            }
            for name, split in index.splits.items()
        },
    }
    (folder / "index.json").write_text(json.dumps(document))
    for name in ("index.rows", "index.paths"):
        (folder / name).unlink()
