"""What is odd about a dataset that is being brought in. Nothing here keeps anybody from training;
what does is an error of `worker.datasets.ingest`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from shared.images import decode_image
from skipline.catalog import Split
from skipline.schemas import Problem
from worker.datasets.columns import ImageColumns, Int64, Trait
from worker.datasets.examine import TOO_LARGE, UNREADABLE
from worker.datasets.layout import NUM_EXAMPLES, SPLITS, Source, warning
from worker.datasets.perceptual import grey_square, near_pairs

TINY_PIXELS = 8
"""A shorter side below this shows next to nothing."""
HUGE_PIXELS = 16_000_000
IMBALANCE = 10
"""A class with so many times the images of another is learnt at the other's expense."""
MIN_SIDE_TO_COMPARE = 24
"""Of smaller images too little is seen to say that two are alike."""
MAX_COMPARED_PAIRS = 20_000
"""Candidates beyond this are not compared: of so many, the report says enough."""
ALIKE = 0.9
"""Correlation of brightness from which on two pictures are one. Of 100 pairs of CIFAR-10 above it
that were looked at, none was of two different pictures."""
FLAT_LEVELS = 2.0
"""Standard deviation of brightness below which a picture has nothing to be told by."""

TRAITS = (
    (Trait.WRONG_SUFFIX, "wrong_suffix", "Files whose names end as another format's"),
    (Trait.GREY, "grey_images", "Grey images among coloured ones"),
    (Trait.CMYK, "cmyk_images", "Images in CMYK, whose colours may look off on a screen"),
    (Trait.ALPHA, "transparent_images", "Images with transparent parts, which become white"),
    (Trait.DEEP, "deep_images", "Images of 16 bits a pixel, of which 8 are kept"),
    (Trait.ANIMATED, "animated_images", "Animations, of which the first frame is taken"),
    (Trait.ROTATED, "rotated_images", "Photos that their camera marked as turned; now upright"),
)

Read = Callable[[int], bytes]


def find_problems(
    columns: ImageColumns,
    rows: Mapping[Split, Int64],
    source: Source,
    left_out: Mapping[str, list[str]],
    read: Read,
) -> list[Problem]:
    """Everything that is odd, each with its count and examples, whatever the order of the source.

    Args:
        rows: the images of each split, after holding out.
        left_out: paths by the problem's code.
        read: the bytes of an image's file.
    """
    finder = _Finder(columns, rows, source, left_out, read)
    return [
        *finder.files(),
        *finder.classes(),
        *finder.traits(),
        *finder.duplicates(),
        *finder.near_duplicates(),
    ]


class _Finder:
    def __init__(
        self,
        columns: ImageColumns,
        rows: Mapping[Split, Int64],
        source: Source,
        left_out: Mapping[str, list[str]],
        read: Read,
    ) -> None:
        self.columns, self.rows, self.source = columns, rows, source
        self.left_out, self.read = left_out, read
        # The split of each image after holding out.
        self.splits = columns.splits.copy()
        for split, own in rows.items():
            self.splits[own] = SPLITS.index(split)

    def path(self, row: int) -> str:
        return self.columns.paths[row]

    def some(self, code: str, message: str, found: npt.NDArray[np.bool_]) -> Iterator[Problem]:
        """A warning about the images where `found` (bool [N]) is true."""
        places = np.flatnonzero(found)
        if len(places):
            paths = sorted(self.path(row) for row in places.tolist())[:NUM_EXAMPLES]
            yield _problem(code, message, len(places), paths)

    def files(self) -> Iterator[Problem]:
        yield from warning(
            UNREADABLE,
            "Files that are no images, or do not decode to their end, were left out",
            self.left_out[UNREADABLE],
        )
        yield from warning(
            TOO_LARGE, "Images with too many pixels were left out", self.left_out[TOO_LARGE]
        )
        columns = self.columns
        all_rows = np.arange(len(columns))
        yield from self.some(
            "tiny_images",
            f"Images with a side below {TINY_PIXELS} pixels, which show next to nothing",
            columns.shorter_sides(all_rows) < TINY_PIXELS,
        )
        yield from self.some(
            "huge_images",
            f"Images of more than {HUGE_PIXELS // 10**6} megapixels, which take long to decode: "
            "make them smaller, training does so anyway",
            columns.widths.astype(np.int64) * columns.heights > HUGE_PIXELS,
        )

    # Classes.

    def classes(self) -> Iterator[Problem]:
        names = self.columns.label_names
        counts = {
            split: np.bincount(self.columns.labels[own], minlength=len(names))
            for split, own in self.rows.items()
        }
        present = {
            (split, names[place]) for split, own in counts.items() for place in np.flatnonzero(own)
        }
        cells = np.unique(self.columns.splits.astype(np.int64) * len(names) + self.columns.labels)
        of_source = {(SPLITS[c // len(names)], names[c % len(names)]) for c in cells.tolist()}
        trained = {label for split, label in present if split == "train"}
        yield from warning(
            "empty_classes",
            "Class folders without a single readable image",
            (f"{split}/{label}" for split, label in self.source.class_folders - of_source),
        )
        yield from warning(
            "classes_differ",
            "Classes of train that another split has no images of",
            (
                f"{split}/{label}"
                for split in counts
                for label in trained
                if (split, label) not in present
            ),
        )
        in_train = counts["train"]
        yield from warning(
            "single_image_classes",
            "Classes with a single image in train",
            (names[place] for place in np.flatnonzero(in_train == 1)),
        )
        yield from self._imbalance(in_train)

    def _imbalance(self, in_train: npt.NDArray[np.int64]) -> Iterator[Problem]:
        largest = in_train.max()
        small = np.flatnonzero((in_train > 0) & (in_train * IMBALANCE <= largest))
        if len(small):
            names = self.columns.label_names
            by_size = sorted(small.tolist(), key=lambda place: (in_train[place], names[place]))
            examples = [f"{names[place]}: {in_train[place]}" for place in by_size[:NUM_EXAMPLES]]
            yield _problem(
                "imbalanced_classes",
                f"Classes with at most a tenth of the {largest} images of the largest one: add "
                "images, and look at their accuracies singly",
                len(small),
                examples,
            )

    # Forms of images.

    def traits(self) -> Iterator[Problem]:
        for trait, code, message in TRAITS:
            has = (self.columns.traits & int(trait)) != 0
            if not (trait is Trait.GREY and has.all()):
                yield from self.some(code, message, has)

    # The same image more than once.

    def duplicates(self) -> Iterator[Problem]:
        """Images whose files are the same, byte by byte."""
        groups = list(_groups(self.columns.digests))
        yield from self._pairs_of("duplicate_images", "The same file twice in a split", groups)
        yield from self._pairs_of(
            "leaked_images",
            "The same file in two splits: what is measured on it says nothing about new images",
            groups,
            across_splits=True,
        )
        yield from self._pairs_of(
            "conflicting_labels", "The same file in two classes", groups, across_labels=True
        )

    def _pairs_of(
        self,
        code: str,
        message: str,
        groups: Iterable[list[int]],
        *,
        across_splits: bool = False,
        across_labels: bool = False,
    ) -> Iterator[Problem]:
        """Of each group the first image with every other that differs from it as asked for; how
        many images there are beyond each group's first."""
        count, examples = 0, []
        for group in groups:
            ordered = sorted(group, key=lambda row: (self.splits[row], self.path(row)))
            first = ordered[0]
            for other in ordered[1:]:
                is_across = self.splits[first] != self.splits[other]
                differs = self.columns.labels[first] != self.columns.labels[other]
                if differs if across_labels else is_across == across_splits:
                    count += 1
                    examples.append(f"{self.path(first)} = {self.path(other)}")
        if count:
            yield _problem(code, message, count, sorted(examples)[:NUM_EXAMPLES])

    def near_duplicates(self) -> Iterator[Problem]:
        """Images that look alike: candidates have near hashes, and are compared then."""
        pairs, is_cut = self._candidates()
        alike = [pair for pair in pairs.tolist() if self._look_alike(*pair)]
        note = f" (more than {MAX_COMPARED_PAIRS} candidates: not all were compared)" * is_cut
        for code, message, across in (
            ("near_duplicates", "Images of a split that look alike", False),
            (
                "leaked_near_duplicates",
                "Images that look like one of another split: what is measured on them promises "
                "too much",
                True,
            ),
        ):
            found = [
                pair for pair in alike if (self.splits[pair[0]] != self.splits[pair[1]]) == across
            ]
            if found:
                texts = sorted(self._pair_text(i, j) for i, j in found)
                yield _problem(code, message + note, len(found), texts[:NUM_EXAMPLES])

    def _pair_text(self, one: int, other: int) -> str:
        first, second = sorted((one, other), key=lambda row: (self.splits[row], self.path(row)))
        return f"{self.path(first)} ~ {self.path(second)}"

    def _candidates(self) -> tuple[Int64, bool]:
        """int64 [M, 2]: pairs of different files with near hashes, whichever order the source had;
        and whether there were too many."""
        columns = self.columns
        large = np.flatnonzero(
            columns.shorter_sides(np.arange(len(columns))) >= MIN_SIDE_TO_COMPARE
        )
        # One of each file, in the order of what is in them.
        keys = np.ascontiguousarray(columns.digests[large]).view("V32").ravel()
        _, firsts = np.unique(keys, return_index=True)
        places = large[firsts]
        pairs = places[near_pairs(columns.phashes[places])]
        return pairs[:MAX_COMPARED_PAIRS], len(pairs) > MAX_COMPARED_PAIRS

    def _look_alike(self, one: int, other: int) -> bool:
        first, second = self._brightness(one), self._brightness(other)
        if min(first.std(), second.std()) < FLAT_LEVELS:
            return False
        return bool(np.corrcoef(first, second)[0, 1] >= ALIKE)

    def _brightness(self, row: int) -> npt.NDArray[np.float64]:
        """float64 [1024]"""
        picture = decode_image(self.read(row), max_pixels=2**62)  # It was decoded before.
        return grey_square(picture).astype(np.float64).ravel()


def _groups(digests: npt.NDArray[np.uint8]) -> Iterator[list[int]]:
    """Rows (uint8 [N, 32]) that are equal, two or more each."""
    keys = np.ascontiguousarray(digests).view("V32").ravel()
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], keys[order[1:]] != keys[order[:-1]]]))
    sizes = np.diff(np.append(starts, len(order)))
    for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
        yield order[start : start + size].tolist()


def _problem(code: str, message: str, count: int, examples: list[str]) -> Problem:
    return Problem(code=code, level="warning", message=message, count=count, examples=examples)
