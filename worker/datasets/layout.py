"""What a source of images is, and how paths become splits and classes.

Knows the layouts of class folders; knows nothing of disks, archives or image formats. Layouts of
published datasets have files of their own beside this one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

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
NUM_EXAMPLES = 10

NOTES = frozenset(
    {
        *("val_annotations.txt", "wnids.txt", "words.txt"),
        *("train_y.bin", "test_y.bin", "class_names.txt", "fold_indices.txt"),
    }
)
"""Small files that say what others show; they are read while a tree is listed."""
MAX_NOTE_BYTES = 8 * 2**20
"""The largest real one, TinyImageNet's words.txt, has less than 3 MiB."""
MAX_NOTES = 16
STREAMS = frozenset({"train_X.bin", "test_X.bin"})
"""Large files with one image behind the other."""
ANNOTATED_FOLDER = ("val", "images")
"""The end of the path of a folder whose files are listed singly: a note says what each shows."""

Read = Callable[[int], bytes]
"""Reads on in a file: exactly so many bytes; for -1 all of it."""

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


class Listing:
    """What a tree holds, junk left out, as far as a layout can be told from it.

    Files are counted by folder, so that millions of them take little memory. `sizes`: bytes of
    those files that are looked at singly; `notes`: the contents of the small ones among them.
    """

    def __init__(self) -> None:
        self.folders: set[Parts] = set()
        self.num_files: Counter[Parts] = Counter()
        self.num_bytes: Counter[Parts] = Counter()
        self.sizes: dict[Parts, int] = {}
        self.notes: dict[Parts, bytes] = {}

    def add_file(self, file: Parts, num_bytes: int, read: Read) -> None:
        """Takes a file in; `read` is used if it is a note."""
        folder, name = file[:-1], file[-1]
        self.num_files[folder] += 1
        self.num_bytes[folder] += num_bytes
        if name in STREAMS or folder[-2:] == ANNOTATED_FOLDER:
            self.sizes[file] = num_bytes
        if name in NOTES and num_bytes <= MAX_NOTE_BYTES and len(self.notes) < MAX_NOTES:
            self.notes[file] = read(-1)


@dataclass(frozen=True)
class Survey:
    """What a layout finds in a tree: the images and bytes that will come, the class folders, be
    they empty, and what is odd."""

    num_images: int
    num_bytes: int
    class_folders: frozenset[tuple[Split, str]]
    problems: tuple[Problem, ...] = ()


def source_of(survey: Survey, read: Callable[[], Iterator[SourceImage]]) -> Source:
    """The source that the survey announces.

    Raises:
        TrainingError: `bad_class_name`.
    """
    check_class_names(sorted({label for _, label in survey.class_folders}))
    return Source(survey.num_images, survey.num_bytes, survey.class_folders, read, survey.problems)


class Layout(Protocol):
    """How the files of a tree become images."""

    @property
    def has_large_files(self) -> bool:
        """True when its files are not single images, and may be larger than one."""

    def survey(self, listing: Listing) -> Survey:
        """Counts what will come."""

    def wants(self, file: Parts) -> bool:
        """True of files with images."""

    def images(self, file: Parts, read: Read) -> Iterator[SourceImage]:
        """The images in a file that it wants."""


@dataclass(frozen=True)
class ClassFolders:
    """Where in a tree the classes are: below `wrapper`, and there below splits or not."""

    wrapper: Parts
    has_splits: bool
    has_large_files = False

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

    def survey(self, listing: Listing) -> Survey:
        inside = [folder for folder in listing.num_files if self.place(folder)]
        return Survey(
            sum(listing.num_files[folder] for folder in inside),
            sum(listing.num_bytes[folder] for folder in inside),
            frozenset(place for folder in listing.folders if (place := self.place(folder))),
        )

    def wants(self, file: Parts) -> bool:
        return self.place(file[:-1]) is not None

    def images(self, file: Parts, read: Read) -> Iterator[SourceImage]:
        place = self.place(file[:-1])
        assert place is not None
        yield SourceImage(*place, printable("/".join(file)), read(-1))


class LooseFiles:
    """Any files, wherever they lie: images to be looked at, of which nobody says what they show."""

    has_large_files = False

    def survey(self, listing: Listing) -> Survey:
        return Survey(listing.num_files.total(), listing.num_bytes.total(), frozenset())

    def wants(self, file: Parts) -> bool:
        return True

    def images(self, file: Parts, read: Read) -> Iterator[SourceImage]:
        yield SourceImage("test", "", printable("/".join(file)), read(-1))


def find_class_folders(folders: Iterable[Parts]) -> ClassFolders:
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
            return ClassFolders(wrapper, has_splits=True)
        only = (*wrapper, *tops) if len(tops) == 1 else None
        if only is None or only not in children:
            return ClassFolders(wrapper, has_splits=False)
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


def warning(code: str, message: str, paths: Iterable[str]) -> tuple[Problem, ...]:
    """A problem that keeps nobody from training, or none if there are no paths."""
    examples = sorted(paths)
    if not examples:
        return ()
    return (
        Problem(
            code=code,
            level="warning",
            message=message,
            count=len(examples),
            examples=examples[:NUM_EXAMPLES],
        ),
    )
