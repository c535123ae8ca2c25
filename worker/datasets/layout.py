"""What a source of images is, and how paths become splits and classes.

Knows the layouts of class folders; knows nothing of disks, archives or image formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from shared.errors import TrainingError
from skipline.catalog import Split
from skipline.schemas import Problem

SPLITS: tuple[Split, ...] = ("train", "val", "test")
SPLIT_FOLDERS: dict[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
JUNK = frozenset({"__macosx", "thumbs.db", "desktop.ini"})
MAX_CLASS_NAME = 200
"""Characters of a class name, as of every other label."""
MAX_FILE_BYTES = 64 * 2**20
"""A file beyond this is no image to train on; it bounds what reading one takes of the memory."""
LAYOUT_HINT = (
    "Lay the images out as <class>/<image>, or as train/<class>/<image> with val or test beside it"
)

Parts = tuple[str, ...]
"""A relative path, cut at its slashes."""


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One file as found: its split, the name of its class, its relative path, its bytes."""

    split: Split
    label: str
    path: str
    data: bytes


@dataclass(frozen=True)
class Source:
    """Images to bring in. Iterating reads them one by one, each time in the same order.

    `num_images` and `num_bytes` count the files that will come; `class_folders` are the classes
    of each split that have a folder, be it empty; `problems` were found while listing.
    """

    num_images: int
    num_bytes: int
    class_folders: frozenset[tuple[Split, str]]
    read: Callable[[], Iterator[SourceImage]]
    problems: tuple[Problem, ...] = ()

    def __iter__(self) -> Iterator[SourceImage]:
        return self.read()


@dataclass(frozen=True)
class Layout:
    """Where in a tree the classes are: below `wrapper`, and there below splits or not."""

    wrapper: Parts
    has_splits: bool

    def place(self, folder: Parts) -> tuple[Split, str] | None:
        """The split and class of what lies in `folder`, or None where no class is.

        Folders below a class belong to that class.
        """
        depth = len(self.wrapper)
        if folder[:depth] != self.wrapper:
            return None
        inner = folder[depth:]
        if not self.has_splits:
            return ("train", inner[0]) if inner else None
        split = SPLIT_FOLDERS.get(inner[0]) if len(inner) > 1 else None
        return (split, inner[1]) if split else None


def find_layout(folders: Iterable[Parts]) -> Layout:
    """The layout of a tree with these folders, every one of them named, junk left out.

    Splits are taken as such when the folders at the top are nothing else, or when `train` has a
    `val` or `test` beside it; otherwise they are classes (a `train` beside `bus` and `car`). A
    single folder that only holds folders is a wrapper around the layout, and so are those in it.
    """
    children: dict[Parts, set[str]] = {}
    for folder in folders:
        for depth in range(len(folder)):
            children.setdefault(folder[:depth], set()).add(folder[depth])
    wrapper: Parts = ()
    while True:
        tops = children.get(wrapper, set())
        splits = tops & SPLIT_FOLDERS.keys()
        if splits and (splits == tops or ("train" in splits and len(splits) > 1)):
            return Layout(wrapper, has_splits=True)
        only = (*wrapper, *tops) if len(tops) == 1 else None
        if only is None or only not in children:
            return Layout(wrapper, has_splits=False)
        wrapper = only


def is_junk(name: str) -> bool:
    """True of hidden files and of what operating systems leave in folders."""
    return name.startswith(".") or name.casefold() in JUNK


def check_class_names(classes: Iterable[str]) -> None:
    """Class names become labels in answers and files, so they must be harmless text.

    Raises:
        TrainingError: `bad_class_name`.
    """
    for name in classes:
        has_control = any(ord(character) < 32 or ord(character) == 127 for character in name)
        if has_control or len(name) > MAX_CLASS_NAME or printable(name) != name:
            raise TrainingError(
                "bad_class_name",
                f"The class folder {printable(name[:MAX_CLASS_NAME])!r} cannot be a label",
                f"Name it with at most {MAX_CLASS_NAME} printable characters in UTF-8",
            )


def printable(path: str) -> str:
    """The path as valid Unicode: what of a file name was not UTF-8 shows as `?`."""
    return path.encode("utf-8", "replace").decode()
