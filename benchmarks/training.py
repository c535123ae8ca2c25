"""Whole epochs against what a user would have otherwise: the published systems' loop, timm,
torchvision's reference, and the bare arithmetic.

    python benchmarks/training.py [--system cifar10|tinyimagenet|stl10|all] [--data FOLDER]
                                  [--images N] [--rounds R] [--full] [--json FILE]
    python benchmarks/training.py --system tinyimagenet --data FOLDER --accuracy [--epochs E]

Images per second over an epoch, from the first file to the last metric, without validation. All
train the same network from the same weights on the same JPEG files with the same batch, optimizer
and threads, and take turns in one run, so that they see the same machine. Ours reads packed arrays;
packing is paid once and its time is told apart. Without `--data` the files are noise. Exit code 1
if a goal is missed, 2 for wrong usage.

`--accuracy` trains the published VGG and ours on a few classes with the same seed, weights and
epochs, and compares what they reach on `val`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    # In place of this file's folder, whose queue.py would hide the standard library's.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from benchmarks.baselines import bare, images, ours, published, timm_script, torchvision_reference
from benchmarks.baselines.problem import Problem, Turn, WrongUsage, hardware
from shared.settings import num_cores
from skipline.catalog import SpecRefused
from skipline.recipes import RECIPES
from skipline.specs import IngestSpec, TrainSpec
from worker.engine.runtime import Precision, Runtime

NUM_TIMED_VAL_IMAGES = 8
"""`fit` always validates; this is not timed, so a handful will do."""

OURS_FP32, OURS_AUTO, PUBLISHED = "ours fp32", "ours auto", "published"


@dataclass(frozen=True)
class System:
    """A published system: its recipe, and how many images show its speed on two cores. The noise
    that stands in for its images has `image_size` pixels and `num_classes` classes."""

    recipe: str
    num_images: int
    image_size: int
    num_classes: int


SYSTEMS = {
    "cifar10": System("cifar10_resnet18", 1280, 32, 10),
    "tinyimagenet": System("tinyimagenet_vgg", 500, 64, 100),
    "stl10": System("stl10_resnet50", 2560, 224, 10),
}
SMALL_SYSTEMS = ("cifar10", "tinyimagenet")
"""What `all` means. ResNet-50 at 224 px is for GPUs: two cores take minutes for a batch or two."""


@dataclass(frozen=True)
class Goal:
    """`contender` reaches at least `least` times the images per second of `other`."""

    contender: str
    other: str
    least: float


@dataclass(frozen=True)
class Entry:
    """A system, ready to be trained by all; ours reads `data`, the others the problem's files.

    `runtimes` are those of a job with all the recipe's epochs, by its `precision`: chosen once, so
    that `auto` means the same in every round.
    """

    problem: Problem
    data: ours.OurData
    runtimes: Mapping[Literal["fp32", "auto"], Runtime]

    def run_ours(self, precision: Literal["fp32", "auto"]) -> Turn:
        """An epoch of the engine's `fit`, its set-up included."""
        spec = self.problem.spec.model_copy(update={"precision": precision})
        runtime = self.runtimes[precision]
        runtime.activate(deterministic=spec.deterministic)
        splits = self.data.split("train"), self.data.validation.first(NUM_TIMED_VAL_IMAGES)
        model = self.problem.new_model()
        stopwatch = ours.Stopwatch(runtime.torch_device)
        ours.train(spec, model, splits, self.problem.preprocessing, runtime, stopwatch)
        num_images = len(splits[0]) // spec.batch_size * spec.batch_size
        return Turn(num_images, stopwatch.epochs[-1].seconds)

    def run_bare(self, precision: Precision) -> Turn:
        train = self.data.split("train")
        pixels = torch.from_numpy(np.array(train.images))
        return bare.run(self.problem, precision, pixels, torch.from_numpy(np.array(train.labels)))

    @property
    def auto_precision(self) -> Precision:
        """What `auto` means here."""
        return self.runtimes["auto"].precision


Contenders = dict[str, Callable[[], Turn]]


def chosen_runtimes(
    spec: TrainSpec, data: ours.OurData, num_threads: int
) -> dict[Literal["fp32", "auto"], Runtime]:
    assert spec.recipe is not None, "every system is a recipe"
    num_epochs = RECIPES[spec.recipe].spec["epochs"]

    def runtime(precision: Literal["fp32", "auto"]) -> Runtime:
        changed = spec.model_copy(update={"precision": precision})
        return ours.prepare(changed, data, num_threads, num_epochs)

    return {"fp32": runtime("fp32"), "auto": runtime("auto")}


def contenders(entry: Entry) -> Contenders:
    problem = entry.problem
    found: Contenders = {
        OURS_FP32: lambda: entry.run_ours("fp32"),
        OURS_AUTO: lambda: entry.run_ours("auto"),
        PUBLISHED: lambda: published.run(problem),
        "torchvision": lambda: torchvision_reference.run(problem),
    }
    precisions: set[Precision] = {"fp32", "bf16", entry.auto_precision}
    for precision in sorted(precisions):
        found[f"bare {precision}"] = partial(entry.run_bare, precision)
    if timm_script.is_installed():
        found["timm"] = lambda: timm_script.run(problem)
    return found


def goals(auto_precision: str) -> list[Goal]:
    """The bare loop that `ours auto` is held against computes in the precision that it chose."""
    return [
        Goal(OURS_FP32, PUBLISHED, 1.15),
        Goal(OURS_AUTO, PUBLISHED, 2.0),
        Goal(OURS_FP32, "bare fp32", 0.97),
        Goal(OURS_AUTO, f"bare {auto_precision}", 0.97),
    ]


def take_turns(runs: Contenders, num_rounds: int) -> dict[str, list[Turn]]:
    """Back and forth, so that what the machine does meanwhile hits all alike."""
    turns: dict[str, list[Turn]] = {name: [] for name in runs}
    for number in range(num_rounds):
        in_order = list(runs.items())
        for name, run in in_order if number % 2 == 0 else reversed(in_order):
            turns[name].append(run())
            rate = turns[name][-1].images_per_second
            print(f"  round {number + 1}: {name:12} {rate:9.1f} images/s", flush=True)
    return turns


# --------------------------------------------------------------------------------------- the data


def choose_files(
    root: Path, num_images: int | None, num_classes: int | None
) -> tuple[images.ImagesOfClasses, images.ImagesOfClasses]:
    """Images of train, and those of val that show the same classes."""
    train, val = images.images_of(root, "train"), images.validation_images(root)
    if not train or not val:
        raise WrongUsage(f"no images in train/<class> and val/<class> or test/<class> of {root}")
    if num_classes is not None:
        train = dict(list(train.items())[:num_classes])
    if num_images is not None:
        if num_images > images.count(train):
            raise WrongUsage(f"--images {num_images}: there are {images.count(train)}")
        train = images.take(train, num_images)
    return train, {label: val[label] for label in train if label in val}


def lay_out(
    arguments: argparse.Namespace, system: System, folder: Path, num_classes: int | None = None
) -> None:
    """The files of this run as `folder/files/train/<class>/` and `folder/files/val/<class>/`."""
    root = arguments.data
    num_images = arguments.images or system.num_images
    if root is None:
        root = folder / "noise"
        images.make_noise(root, system.image_size, system.num_classes, num_images)
    is_whole = arguments.full or arguments.accuracy
    train, val = choose_files(root, arguments.images if is_whole else num_images, num_classes)
    if not arguments.accuracy:
        val = images.take(val, len(val))
    images.copy(train, folder / "files" / "train")
    images.copy(val, folder / "files" / "val")


def enter(arguments: argparse.Namespace, system: System, folder: Path) -> Entry:
    """Brings the laid-out files in and packs them."""
    files = folder / "files"
    settings = ours.folder_settings(folder, arguments.threads)
    source = IngestSpec(source="path", path=str(files))
    data = ours.bring_in(source, system.image_size, folder / "home", settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_epochs = arguments.epochs if arguments.accuracy else 1 + (device.type == "cuda")
    changes = {"epochs": num_epochs, "seed": arguments.seed}
    if "image_size" in RECIPES[system.recipe].spec:  # It resizes images, which the noise spares.
        changes["image_size"] = system.image_size
    if arguments.batch_size:
        changes["batch_size"] = arguments.batch_size
    spec = ours.recipe_spec(system.recipe, data, **changes)
    num_train = data.packed.counts["train"]
    if num_train < spec.batch_size:
        raise WrongUsage(f"--images: {num_train} are less than a batch of {spec.batch_size}")
    num_classes = len(data.packed.classes)
    problem = Problem(
        spec=spec,
        preprocessing=ours.preprocessing_of(spec, data.record),
        folder=files,
        num_classes=num_classes,
        new_model=lambda: ours.initial_model(spec, num_classes),
        device=device,
        num_workers=arguments.workers,
        num_epochs=num_epochs,
    )
    return Entry(problem, data, chosen_runtimes(spec, data, arguments.threads))


# ------------------------------------------------------------------------------------ the results


def rates(turns: Sequence[Turn]) -> list[float]:
    return [turn.images_per_second for turn in turns]


def with_packing(turns: Sequence[Turn], packing_seconds: float) -> float:
    """Images per second of a single epoch that pays for packing alone."""
    return statistics.median(turn.num_images / (turn.seconds + packing_seconds) for turn in turns)


def summarize(
    turns: dict[str, list[Turn]], packing_seconds: float, auto_precision: str
) -> dict[str, Any]:
    """Rates, ratios to the published loop, and the goals."""
    medians = {name: statistics.median(rates(taken)) for name, taken in turns.items()}
    base = medians[PUBLISHED]
    checked = []
    for goal in goals(auto_precision):
        ratio = medians[goal.contender] / medians[goal.other]
        checked.append({**vars(goal), "ratio": ratio, "is_met": ratio >= goal.least})
    return {
        "auto_precision": auto_precision,
        "images_per_second": {name: rates(taken) for name, taken in turns.items()},
        "medians": medians,
        "ratios_to_published": {name: value / base for name, value in medians.items()},
        "packing_seconds": packing_seconds,
        "ratios_with_packing": {
            name: with_packing(turns[name], packing_seconds) / base
            for name in (OURS_FP32, OURS_AUTO)
        },
        "goals": checked,
    }


def show(document: dict[str, Any]) -> None:
    print(f"\n{'':14}{'images/s':>10}{'lowest':>10}{'highest':>10}{'ratio':>8}")
    for name, taken in document["images_per_second"].items():
        ratio = document["ratios_to_published"][name]
        median = document["medians"][name]
        print(f"{name:14}{median:10.1f}{min(taken):10.1f}{max(taken):10.1f}{ratio:8.2f}")
    if "timm" not in document["medians"]:
        print("timm is left out: it is not installed (pip install timm)")
    packing = document["ratios_with_packing"]
    print(
        f"packing took {document['packing_seconds']:.1f} s, once; a single epoch that pays for it: "
        f"ratio {packing[OURS_FP32]:.2f} at fp32, {packing[OURS_AUTO]:.2f} at auto "
        f"({document['auto_precision']})"
    )
    for goal in document["goals"]:
        verdict = "met" if goal["is_met"] else "MISSED"
        print(
            f"{goal['contender']} / {goal['other']}: {goal['ratio']:.3f}, "
            f"at least {goal['least']}: {verdict}"
        )


def warm_up(arguments: argparse.Namespace, system: System, batch_size: int, folder: Path) -> None:
    """A batch by each contender that counts for none: whoever comes first would make the kernels
    of this batch size for the others, and touch the memory for them."""
    once = argparse.Namespace(**vars(arguments) | {"images": batch_size})
    lay_out(once, system, folder)
    for run in contenders(enter(once, system, folder)).values():
        run()


def measure(arguments: argparse.Namespace, system: System) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="skipline-bench-") as name:
        lay_out(arguments, system, Path(name))
        entry = enter(arguments, system, Path(name))
        spec, num_images = entry.problem.spec, entry.data.packed.counts["train"]
        print(
            f"{spec.recipe}: {num_images} images, batch {spec.batch_size}, "
            f"{arguments.threads} threads, {arguments.workers} loader processes "
            f"({published.NUM_WORKERS} in the description)"
        )
        warm_up(arguments, system, spec.batch_size, Path(name) / "warm-up")
        turns = take_turns(contenders(entry), arguments.rounds)
        document = summarize(turns, entry.data.seconds, entry.auto_precision)
    show(document)
    about = {"recipe": spec.recipe, "num_images": num_images, "batch_size": spec.batch_size}
    return about | document


def compare_accuracy(arguments: argparse.Namespace, system: System) -> dict[str, Any]:
    """Top-1 on `val`, of theirs with dropout active and of ours in evaluation mode."""
    with tempfile.TemporaryDirectory(prefix="skipline-bench-") as name:
        lay_out(arguments, system, Path(name), arguments.classes)
        entry = enter(arguments, system, Path(name))
        problem, data = entry.problem, entry.data
        runtime = entry.runtimes["fp32"]
        runtime.activate(deterministic=problem.spec.deterministic)
        stopwatch = ours.Stopwatch(runtime.torch_device)
        splits = data.split("train"), data.validation
        model = problem.new_model()
        ours.train(problem.spec, model, splits, problem.preprocessing, runtime, stopwatch)
        theirs = published.val_top1(problem)
    document = {
        "recipe": problem.spec.recipe,
        "num_classes": problem.num_classes,
        "num_images": data.packed.counts,
        "num_epochs": problem.num_epochs,
        "ours_val_top1": stopwatch.epochs[-1].top1,
        "published_val_top1": theirs,
        "goals": [{"is_met": stopwatch.epochs[-1].top1 >= theirs}],
    }
    print(
        f"{problem.num_classes} classes, {problem.num_epochs} epochs: top-1 on val "
        f"{document['ours_val_top1']:.4f} (ours), {theirs:.4f} (published, dropout active)"
    )
    return document


# ------------------------------------------------------------------------------------------- main


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--system", choices=[*SYSTEMS, "all"], default="cifar10")
    made.add_argument("--data", type=Path, help="train/<class>/ and val/ or test/<class>/")
    made.add_argument("--images", type=positive, help="of train; by default enough for two cores")
    made.add_argument("--rounds", type=positive, default=3)
    made.add_argument("--full", action="store_true", help="all images of --data")
    made.add_argument("--batch-size", type=positive, help="by default the recipe's")
    made.add_argument("--workers", type=int, default=2, help="processes of a DataLoader")
    made.add_argument("--threads", type=positive, default=num_cores())
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--accuracy", action="store_true", help="compare accuracy, not speed")
    made.add_argument("--epochs", type=positive, default=3, help="with --accuracy")
    made.add_argument("--classes", type=positive, default=10, help="with --accuracy")
    made.add_argument("--json", type=Path, help="write all figures to this file")
    return made


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def check(arguments: argparse.Namespace) -> None:
    if arguments.data is not None and not arguments.data.is_dir():
        raise WrongUsage(f"--data {arguments.data}: there is no such folder")
    if arguments.data is not None and arguments.system == "all":
        raise WrongUsage("--data holds the images of one system: name it with --system")
    if arguments.full and arguments.data is None:
        raise WrongUsage("--full needs --data")
    if arguments.accuracy and arguments.system != "tinyimagenet":
        raise WrongUsage("--accuracy is for --system tinyimagenet")


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    names = [*SMALL_SYSTEMS] if arguments.system == "all" else [arguments.system]
    run = compare_accuracy if arguments.accuracy else measure
    torch.set_num_threads(arguments.threads)
    try:
        check(arguments)
        documents = {name: run(arguments, SYSTEMS[name]) for name in names}
    except (WrongUsage, SpecRefused) as error:
        parser().error(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = f"{hardware(device)}, torch {torch.__version__}"
    print(f"{about}, {arguments.threads} threads")
    if arguments.json:
        result = {
            "date": datetime.now(UTC).date().isoformat(),
            "hardware": hardware(device),
            "torch": torch.__version__,
            "num_threads": arguments.threads,
            "num_workers": arguments.workers,
            "systems": documents,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    all_met = all(goal["is_met"] for document in documents.values() for goal in document["goals"])
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
