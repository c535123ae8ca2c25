"""Class folders on the server's disk. Reads nothing outside the folder it was given."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from shared.errors import TrainingError
from shared.settings import Settings
from skipline.schemas import Problem
from worker.datasets.layout import (
    MAX_FILE_BYTES,
    Parts,
    Source,
    SourceImage,
    check_class_names,
    find_layout,
    is_junk,
    printable,
)

NUM_EXAMPLES = 10


def open_folder(root: Path, settings: Settings) -> Source:
    """The class folders below `root`, sorted by path.

    Links are left out, and listed as a problem when they lead out of `root` or to a folder; a
    link to a file within `root` is read as that file.

    Raises:
        TrainingError: `dataset_too_large`, `file_too_large`, `bad_class_name`, `unreadable_folder`.
    """
    root = root.resolve()
    folders: list[Parts] = []
    files: list[Parts] = []
    links: list[Parts] = []
    num_bytes = 0
    pending: list[Parts] = [()]
    while pending:
        folder = pending.pop()
        for entry in _entries(root, folder):
            parts = (*folder, entry.name)
            if entry.is_symlink() and not _is_file_within(Path(entry.path), root):
                links.append(parts)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(parts)
                pending.append(parts)
            elif entry.is_file():
                files.append(parts)
                num_bytes += entry.stat().st_size
                if len(files) > settings.max_dataset_images:
                    raise TrainingError(
                        "dataset_too_large",
                        f"The folder holds more than {settings.max_dataset_images} files",
                        "Use a part of it, or raise SKIPLINE_MAX_DATASET_IMAGES",
                    )
    layout = find_layout(folders)
    files = sorted(parts for parts in files if layout.place(parts[:-1]))
    places = frozenset(place for folder in folders if (place := layout.place(folder)))
    check_class_names(sorted({label for _, label in places}))

    def read() -> Iterator[SourceImage]:
        for parts in files:
            place = layout.place(parts[:-1])
            assert place is not None
            path = printable("/".join(parts))
            yield SourceImage(*place, path, _read_file(root.joinpath(*parts), path))

    return Source(len(files), num_bytes, places, read, _link_problems(links))


def _entries(root: Path, folder: Parts) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root.joinpath(*folder)) as entries:
            return [entry for entry in entries if not is_junk(entry.name)]
    except OSError:
        shown = printable("/".join(folder)) or "The dataset's folder"
        raise TrainingError(
            "unreadable_folder",
            f"{shown} cannot be listed",
            "See that the worker's user may read every folder of the dataset",
        ) from None


def _is_file_within(link: Path, root: Path) -> bool:
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):  # dangling, or a loop
        return False
    return target.is_file() and target.is_relative_to(root)


def _read_file(file: Path, path: str) -> bytes:
    """At most `MAX_FILE_BYTES`; a file that grew too large meanwhile is not read to its end."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError:
        raise TrainingError(
            "unreadable_file",
            f"{path} cannot be read",
            "See that the worker's user may read the dataset and that nobody changes it",
        ) from None
    if len(data) > MAX_FILE_BYTES:
        raise TrainingError(
            "file_too_large",
            f"{path} has more than {MAX_FILE_BYTES // 2**20} MiB",
            "Take it out of the class folders, or store the image smaller",
        )
    return data


def _link_problems(links: list[Parts]) -> tuple[Problem, ...]:
    if not links:
        return ()
    return (
        Problem(
            code="links_left_out",
            level="warning",
            message="Links to folders and links out of the dataset are not followed",
            count=len(links),
            examples=[printable("/".join(parts)) for parts in sorted(links)[:NUM_EXAMPLES]],
        ),
    )
