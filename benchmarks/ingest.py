"""How fast an archive of images becomes a dataset that can be trained on, against a pass of
torchvision's ImageFolder with two loader processes over the same files.

    python -m benchmarks.ingest --archive FILE [FILE ...] [--rounds 3] [--json FILE]

For each archive, in every round: it is sent to a real API in parts; brought in (its list checked,
every file hashed, decoded and examined, duplicates looked for); packed at the size that trainings
take by default; and, extracted before, read once by ImageFolder and a DataLoader, resized and
cropped to that size. The images of the splits that ImageFolder understands count. Each stage runs
in a process of its own, whose memory is told. Rounds are interleaved; medians are shown.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.baselines.problem import hardware
from benchmarks.cluster import cluster
from benchmarks.figures import Figure, seconds_of, write_figures
from shared.settings import Settings
from skipline import Skipline
from skipline.uploading import Memory
from worker.datasets.archives import open_archive
from worker.datasets.ingest import DatasetRecord, ingest
from worker.datasets.packing import pack

BATCH_SIZE = 256
NUM_LOADERS = 2
LEAST_RATE = 3000.0
LEAST_PACKING_RATIO = 2.0
MOST_MEMORY_GIB = 1.5


@dataclass
class Rounds:
    """Seconds of each stage, by round, and the most memory that one took, in bytes."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    def add(self, stage: str, seconds: float, memory: int = 0) -> None:
        self.seconds.setdefault(stage, []).append(seconds)
        self.memory[stage] = max(memory, self.memory.get(stage, 0))

    def median(self, stage: str) -> float:
        return statistics.median(self.seconds[stage])


def bring_in(archive: Path, folder: Path, settings: Settings) -> DatasetRecord:
    """What a worker does with an upload."""
    folder.mkdir()
    return ingest(open_archive(archive, settings), archive.name, None, 0, folder, settings)


def pack_all(record: DatasetRecord, folder: Path, cache: Path, settings: Settings) -> None:
    pack(folder, record.image_size, cache, record.hash, max_pixels=settings.max_image_pixels)


def image_folders(root: Path) -> list[Path]:
    """The folders below `root` that hold class folders of images: its splits, or itself."""
    while len(children := [path for path in root.iterdir() if path.is_dir()]) == 1:
        root = children[0]
    splits = [path for path in children if path.name in ("train", "val", "test")]
    usable = [path for path in splits if len([c for c in path.iterdir() if c.is_dir()]) > 1]
    return usable or [root]


def read_as_image_folder(folders: Sequence[Path], image_size: int) -> int:
    """One pass with resized and cropped tensors; how many images there were."""
    steps = [transforms.Resize(image_size), transforms.CenterCrop(image_size)]
    transform = transforms.Compose([*steps, transforms.ToTensor()])
    num_images = 0
    for folder in folders:
        dataset = ImageFolder(str(folder), transform)
        for images, _ in DataLoader(dataset, BATCH_SIZE, num_workers=NUM_LOADERS):
            num_images += len(images)
    return num_images


def extract(archive: Path, folder: Path) -> None:
    """For ImageFolder, which reads no archives. The archive is trusted: it is the user's own."""
    if zipfile.is_zipfile(archive):
        zipfile.ZipFile(archive).extractall(folder)
    else:
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")


# ------------------------------------------------------------------------- a process for each stage


def in_a_process(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """The result, the seconds, and the peak of the process's memory with its children's, in bytes:
    what was there before, libraries above all, is in it."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, work))
    process.start()
    sender.close()
    try:
        outcome: tuple[Any, float, int] = receiver.recv()
    except EOFError:
        raise SystemExit("a stage ended without a result") from None
    process.join()
    return outcome


def _report(sender: Any, work: Callable[[], Any]) -> None:
    result: list[Any] = []
    seconds = seconds_of(lambda: result.append(work()))
    peaks = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    sender.send((result[0], seconds, sum(peaks) * (1024 if sys.platform == "linux" else 1)))


# ------------------------------------------------------------------------------------------- main


def measure(archive: Path, num_rounds: int) -> list[Figure]:
    rounds = Rounds()
    with tempfile.TemporaryDirectory(prefix="skipline-ingest-") as name:
        place = Path(name)
        extract(archive, place / "extracted")
        folders = image_folders(place / "extracted")
        settings = Settings(_env_file=None, home=place)  # type: ignore[call-arg]
        with cluster("sqlite") as servers, servers.api() as port:
            for number in range(num_rounds):
                with Skipline(f"http://127.0.0.1:{port}") as client:
                    memory = Memory(place / "uploads.json")
                    send = partial(client.upload, archive, memory=memory)
                    rounds.add("sending", seconds_of(send))
                stored, cache = place / f"stored{number}", place / f"cache{number}"
                record, *spent = in_a_process(partial(bring_in, archive, stored, settings))
                rounds.add("bringing in", *spent)
                work = partial(pack_all, record, stored, cache, settings)
                rounds.add("packing", *in_a_process(work)[1:])
                work = partial(read_as_image_folder, folders, record.image_size)
                seen, *spent = in_a_process(work)
                rounds.add("ImageFolder", *spent)
    num_images = sum(split.num_images for split in record.splits.values())
    return figures_of(rounds, num_images, seen)


def figures_of(rounds: Rounds, num_images: int, num_seen: int) -> list[Figure]:
    """`num_seen`: images that ImageFolder found."""
    ours = ("sending", "bringing in", "packing")
    rates = [Figure(stage, num_images / rounds.median(stage), "images/s") for stage in ours]
    whole = num_images / sum(rounds.median(stage) for stage in ours)
    theirs = num_seen / rounds.median("ImageFolder")
    memory = max(rounds.memory.values()) / 2**30
    ours_memory = max(rounds.memory[stage] for stage in ours) / 2**30
    return [
        *rates,
        Figure("from the upload to packed", whole, "images/s", at_least=LEAST_RATE),
        Figure("ImageFolder, 2 loader processes", theirs, "images/s"),
        Figure(
            "packing, against ImageFolder",
            num_images / rounds.median("packing") / theirs,
            "times",
            at_least=LEAST_PACKING_RATIO,
        ),
        Figure("memory of a stage at most", ours_memory, "GiB", at_most=MOST_MEMORY_GIB),
        Figure("memory with ImageFolder's processes", memory, "GiB"),
    ]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.ingest", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--archive", type=Path, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args(words)
    for archive in arguments.archive:
        if not archive.is_file():
            parser.error(f"--archive {archive}: there is no such file")
    machine = hardware(torch.device("cpu"))
    print(machine, flush=True)
    measured: dict[str, list[Figure]] = {}
    for archive in arguments.archive:
        measured[archive.name] = measure(archive, max(1, arguments.rounds))
        print(f"\n{archive.name}")
        for figure in measured[archive.name]:
            print(figure, flush=True)
    if arguments.json:
        write_figures(arguments.json, {"hardware": machine}, measured)
    return 0 if all(f.is_met for figures in measured.values() for f in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
