"""Folders of images on the server's disk. Reads nothing outside the folder it was given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO

from shared.errors import TrainingError
from shared.settings import Settings
from skipline.schemas import Problem
from worker.datasets.formats import find_layout
from worker.datasets.layout import (
    MAX_FILE_BYTES,
    Layout,
    Listing,
    Parts,
    Read,
    Source,
    SourceImage,
    is_junk,
    printable,
    source_of,
    warning,
)


def open_folder(
    root: Path, settings: Settings, find: Callable[[Listing], Layout] = find_layout
) -> Source:
    """The images below `root`, sorted by path. `find` tells the layout.

    Links are left out, and listed as a problem when they lead out of `root` or to a folder; a
    link to a file within `root` is read as that file.

    Raises:
        TrainingError: `dataset_too_large`, `file_too_large`, `bad_class_name`, `unreadable_folder`,
            `unreadable_file`, what `find` raises.
    """
    root = root.resolve()
    listing = Listing()
    files: list[Parts] = []
    links: list[Parts] = []
    pending: list[Parts] = [()]
    while pending:
        folder = pending.pop()
        for entry in _entries(root, folder):
            parts = (*folder, entry.name)
            if entry.is_symlink() and not _is_file_within(Path(entry.path), root):
                links.append(parts)
            elif entry.is_dir(follow_symlinks=False):
                listing.folders.add(parts)
                pending.append(parts)
            elif entry.is_file():
                files.append(parts)
                if len(files) > settings.max_dataset_images:
                    raise TrainingError(
                        "dataset_too_large",
                        f"The folder holds more than {settings.max_dataset_images} files",
                        "Use a part of it, or raise SKIPLINE_MAX_DATASET_IMAGES",
                    )
                with ExitStack() as opened:
                    listing.add_file(parts, entry.stat().st_size, _reader(root, parts, opened))
    layout = find(listing)
    files = sorted(parts for parts in files if layout.wants(parts))

    def read() -> Iterator[SourceImage]:
        for parts in files:
            with ExitStack() as opened:
                yield from layout.images(parts, _reader(root, parts, opened))

    survey = layout.survey(listing)
    return source_of(replace(survey, problems=(*survey.problems, *_link_problems(links))), read)


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


def _reader(root: Path, parts: Parts, opened: ExitStack) -> Read:
    """Reads a file, which is opened when it is first asked for.

    All of it is at most `MAX_FILE_BYTES`: what grew too large meanwhile is not read to its end.
    """
    stream: IO[bytes] | None = None
    path = printable("/".join(parts))

    def read(size: int) -> bytes:
        nonlocal stream
        try:
            if stream is None:
                stream = opened.enter_context(root.joinpath(*parts).open("rb"))
            data = stream.read(size if size >= 0 else MAX_FILE_BYTES + 1)
        except OSError:
            raise _unreadable(path) from None
        if size < 0 and len(data) > MAX_FILE_BYTES:
            raise TrainingError(
                "file_too_large",
                f"{path} has more than {MAX_FILE_BYTES // 2**20} MiB",
                "Take it out of the class folders, or store the image smaller",
            )
        if 0 <= size != len(data):
            raise _unreadable(path)
        return data

    return read


def _unreadable(path: str) -> TrainingError:
    return TrainingError(
        "unreadable_file",
        f"{path} cannot be read",
        "See that the worker's user may read the dataset and that nobody changes it",
    )


def _link_problems(links: list[Parts]) -> tuple[Problem, ...]:
    return warning(
        "links_left_out",
        "Links to folders and links out of the dataset are not followed",
        (printable("/".join(parts)) for parts in links),
    )
