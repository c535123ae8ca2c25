"""From an ingest spec to the images it names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shared.archive_kinds import without_suffixes
from shared.dataset_paths import check_dataset_path
from shared.errors import AppError, TrainingError
from shared.settings import Settings
from shared.uploads import data_path
from skipline.specs import IngestSpec
from worker.datasets.archives import open_archive
from worker.datasets.builtin import open_builtin
from worker.datasets.folders import open_folder
from worker.datasets.layout import Source, printable
from worker.datasets.locks import never

MAX_NAME = 200
"""Characters of a label."""


def open_source(
    spec: IngestSpec, settings: Settings, should_stop: Callable[[], bool] = never
) -> Source:
    """Lists what the spec names and checks the list; the images are read when it is iterated.

    Raises:
        TrainingError: with the code of what is wrong with the path, the folder or the archive, or
            `download_failed` for a built-in.
        Interrupted: `should_stop()` became true while the files of a built-in were brought here.
    """
    if spec.source == "builtin":
        return open_builtin(spec.name or "", settings, should_stop)
    if spec.upload_id is not None:
        return open_archive(upload_path(settings, spec.upload_id), settings)
    try:
        path = check_dataset_path(spec.path or "", settings)
    except AppError as error:
        hint = "Paths lie below SKIPLINE_DATASET_ROOTS, as the worker sees them"
        raise TrainingError(error.code, error.detail, hint) from None
    return open_folder(path, settings) if path.is_dir() else open_archive(path, settings)


def upload_path(settings: Settings, upload_id: str) -> Path:
    """Where the file lies that a client sent. Raises `TrainingError` `upload_gone`."""
    path = data_path(settings.artifacts_path, upload_id)
    if not path.exists():
        raise TrainingError(
            "upload_gone",
            "The upload is not there any more: it was deleted, or nobody used it for too long",
            "Send the archive again",
        )
    return path


def dataset_name(spec: IngestSpec) -> str:
    """The dataset's name: the spec's own, else the last part of the path without its suffixes."""
    if spec.name is not None:
        return spec.name
    return printable(without_suffixes(spec.path or ""))[:MAX_NAME] or "dataset"
