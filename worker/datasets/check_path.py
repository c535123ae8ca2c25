"""What bringing a folder or an archive in would find, without a server and without keeping it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from shared.errors import TrainingError
from shared.settings import Settings
from skipline.schemas import Problem
from worker.datasets.archives import open_archive
from worker.datasets.folders import open_folder
from worker.datasets.ingest import DatasetRecord, ingest


def check_dataset(
    path: Path,
    settings: Settings,
    *,
    val_fraction: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> tuple[DatasetRecord | None, list[Problem]]:
    """The dataset as it would be, with its problems; or none, and the error that keeps it from
    being brought in. It takes as much of the disk for temporary files as the images do."""
    try:
        source = open_folder(path, settings) if path.is_dir() else open_archive(path, settings)
        with tempfile.TemporaryDirectory(prefix="skipline-check-") as folder:
            record = ingest(source, path.name, val_fraction, seed, Path(folder), settings, progress)
    except TrainingError as error:
        problem = Problem(
            code=error.code,
            level="error",
            message=f"{error.message}. {error.hint}",
            count=1,
            examples=[],
        )
        return None, [problem]
    return record, record.problems
