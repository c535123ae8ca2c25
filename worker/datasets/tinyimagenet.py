"""TinyImageNet as it is published: train by class, val in one folder with a list of what each
image shows (Le & Yang, 2015).

    train/<wnid>/images/*.JPEG      wnids.txt: the classes, by their WordNet id
    val/images/*.JPEG               words.txt: what WordNet calls them
    val/val_annotations.txt         test/images/*.JPEG: without labels, left out

Knows the names and the small files of that tree; nothing of disks, archives or image formats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from shared.errors import TrainingError
from skipline.catalog import Split
from worker.datasets.layout import (
    ANNOTATED_FOLDER,
    Listing,
    Parts,
    Read,
    SourceImage,
    Survey,
    check_class_names,
    printable,
    warning,
)

ANNOTATIONS = ("val", "val_annotations.txt")


@dataclass(frozen=True)
class TinyImageNet:
    """The tree below `root`. `labels`: what each wnid is called, be there a folder of it or not;
    `annotations`: the wnid of each file in val."""

    root: Parts
    labels: dict[str, str]
    annotations: dict[str, str]
    has_large_files = False

    def survey(self, listing: Listing) -> Survey:
        train = [folder for folder in listing.num_files if self._train_class(folder)]
        folder = (*self.root, *ANNOTATED_FOLDER)
        val = {file[-1]: size for file, size in listing.sizes.items() if file[:-1] == folder}
        shown = printable("/".join(folder))
        return Survey(
            sum(listing.num_files[folder] for folder in train)
            + sum(name in self.annotations for name in val),
            sum(listing.num_bytes[folder] for folder in train)
            + sum(size for name, size in val.items() if name in self.annotations),
            frozenset(
                {("train", label) for label in self.labels.values()}
                | {("val", self.labels[wnid]) for wnid in self.annotations.values()}
            ),
            (
                *warning(
                    "images_missing",
                    "Images that val_annotations.txt lists and that are not there",
                    (f"{shown}/{printable(name)}" for name in self.annotations.keys() - val),
                ),
                *warning(
                    "images_without_label",
                    "Images of val that val_annotations.txt does not list were left out",
                    (f"{shown}/{printable(name)}" for name in val.keys() - self.annotations),
                ),
            ),
        )

    def wants(self, file: Parts) -> bool:
        return self._place(file) is not None

    def images(self, file: Parts, read: Read) -> Iterator[SourceImage]:
        place = self._place(file)
        assert place is not None
        yield SourceImage(*place, printable("/".join(file)), read(-1))

    def _place(self, file: Parts) -> tuple[Split, str] | None:
        if file[:-1] == (*self.root, *ANNOTATED_FOLDER):
            wnid = self.annotations.get(file[-1])
            return ("val", self.labels[wnid]) if wnid is not None else None
        wnid = self._train_class(file[:-1])
        return ("train", self.labels[wnid]) if wnid is not None else None

    def _train_class(self, folder: Parts) -> str | None:
        return _train_class(folder, self.root)


def find_tinyimagenet(listing: Listing) -> TinyImageNet | None:
    """The layout of a tree that has it, in one place and wrapped or not; else None.

    A val that somebody has sorted into class folders is none, even with its list beside it.
    """
    roots = [
        note[:-2]
        for note in listing.notes
        if note[-2:] == ANNOTATIONS and listing.num_files[(*note[:-2], *ANNOTATED_FOLDER)]
    ]
    if len(roots) != 1:
        return None
    root = roots[0]
    train = {wnid for folder in listing.folders if (wnid := _train_class(folder, root))}
    if not train:
        return None
    annotations = dict(_pairs(listing.notes[(*root, *ANNOTATIONS)]))
    listed = _lines(listing.notes.get((*root, "wnids.txt"), b""))
    wnids = train | set(annotations.values()) | {line.strip() for line in listed if line.strip()}
    words = dict(_pairs(listing.notes.get((*root, "words.txt"), b"")))
    return TinyImageNet(root, _labels(wnids, words), annotations)


def _train_class(folder: Parts, root: Parts) -> str | None:
    """The wnid of a folder with training images, None of any other."""
    depth = len(root)
    is_one = (
        len(folder) == depth + 3
        and folder[:depth] == root
        and folder[depth] == "train"
        and folder[-1] == "images"
    )
    return folder[-2] if is_one else None


def _labels(wnids: set[str], words: dict[str, str]) -> dict[str, str]:
    """The first of the words for each class where that tells it from the others, else its wnid."""
    terms = {wnid: words.get(wnid, "").partition(",")[0].strip() for wnid in wnids}
    counts = Counter(terms.values())
    return {
        wnid: term if _is_label(term) and counts[term] == 1 and term not in wnids else wnid
        for wnid, term in terms.items()
    }


def _is_label(term: str) -> bool:
    try:
        check_class_names([term])
    except TrainingError:
        return False
    return term != ""


def _pairs(note: bytes) -> Iterator[tuple[str, str]]:
    """The first two of the fields of each line, which tabs separate."""
    for line in _lines(note):
        fields = line.split("\t")
        if len(fields) > 1 and fields[0]:
            yield fields[0], fields[1].strip()


def _lines(note: bytes) -> list[str]:
    return note.decode("utf-8", "replace").split("\n")
