"""CIFAR-10 from scratch by the recipe that is quickest to 94 % (or 95 %), seed after seed.

    python benchmarks/fast_cifar.py [--recipe cifar10_resnet18_fast94|cifar10_resnet18_fast95]
                                    [--data FOLDER] [--seeds 0 1 2 3 4] [--epochs-run N]

Straight through the engine, unattended. Time is that of training alone, with the device
synchronized; loading the data does not count, nor does validation after each epoch. What comes
before the end of the first step (copying images to the device, compiling, choosing kernels) is
named apart. Top-1 is that of the last epoch on all test images, not the best of any epoch.

Writes a JSON file and a row of Markdown to `benchmarks/results/` after every seed; a seed whose
result is there already is skipped. `--epochs-run 3` trains the first three epochs of the whole
schedule: that shows on a CPU that the curve rises as it should. Exit code 1 if a whole run ends
below its target on average, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # In place of this file's folder, whose queue.py would hide the standard library's.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.baselines import ours
from benchmarks.baselines.problem import WrongUsage, hardware
from shared.settings import Settings, get_settings, num_cores
from skipline.catalog import SpecRefused
from skipline.specs import IngestSpec, TrainSpec

TARGETS = {"cifar10_resnet18_fast94": 0.94, "cifar10_resnet18_fast95": 0.95}
RESULTS = Path(__file__).resolve().parent / "results"
IMAGE_SIZE = 32
COLUMNS = (
    "date",
    "hardware",
    "torch",
    "data",
    "epochs",
    "seeds",
    "top-1 on test",
    "seconds of training",
    "seconds to the first step",
)


@dataclass(frozen=True)
class Run:
    """One seed. `curve` is top-1 on test after each epoch; `training_seconds` leaves out what
    `first_step_seconds` covers."""

    top1: float
    training_seconds: float
    first_step_seconds: float
    curve: list[float]
    precision: str
    compiled: bool


def train_seed(
    arguments: argparse.Namespace, data: ours.OurData, spec: TrainSpec, num_epochs: int
) -> Run:
    """Trains the first `num_epochs` of the spec's epochs."""
    runtime = ours.prepare(spec, data, arguments.threads, spec.epochs)
    device = runtime.torch_device
    model = ours.initial_model(spec, len(data.packed.classes))
    stopwatch, first_step = ours.Stopwatch(device), ours.FirstStep(device)

    def leave_in_time() -> None:
        if len(stopwatch.epochs) == num_epochs:
            first_step.request = "release"

    stopwatch.on_epoch = leave_in_time
    splits = data.split("train"), data.validation
    preprocessing = ours.preprocessing_of(spec, data.record)
    ours.train(spec, model, splits, preprocessing, runtime, stopwatch, first_step)
    assert first_step.done is not None, "training looks at its control before every batch"
    first_step_seconds = first_step.done - stopwatch.started
    curve = [epoch.top1 for epoch in stopwatch.epochs]
    seconds = sum(epoch.seconds for epoch in stopwatch.epochs)
    return Run(
        top1=curve[-1],
        training_seconds=max(0.0, seconds - first_step_seconds),
        first_step_seconds=first_step_seconds,
        curve=curve,
        precision=runtime.precision,
        compiled=runtime.compile,
    )


# ------------------------------------------------------------------------------------ the results


def facts_of(
    arguments: argparse.Namespace, data: ours.OurData, spec: TrainSpec, num_epochs: int
) -> dict[str, Any]:
    """What all runs of a file share: figures of different facts are never averaged."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "recipe": spec.recipe,
        "data": "built-in" if arguments.data is None else "folder",
        "dataset_hash": data.record.hash,
        "hardware": hardware(device),
        "torch": torch.__version__,
        "batch_size": spec.batch_size,
        "epochs": spec.epochs,
        "epochs_run": num_epochs,
    }


def result_file(folder: Path, facts: dict[str, Any]) -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", facts["hardware"].lower()).strip("-")
    part = "" if facts["epochs_run"] == facts["epochs"] else f"-first-{facts['epochs_run']}"
    return folder / f"{facts['recipe']}-{device}{part}.json"


def load(file: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The document of earlier runs, or an empty one.

    Raises:
        WrongUsage: the file is of other data, another version of torch, ...
    """
    if not file.exists():
        return {**facts, "runs": {}}
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if different := [key for key, value in facts.items() if document.get(key) != value]:
        raise WrongUsage(f"{file.name} holds runs of another {different[0]}: move it away")
    return document


def store(file: Path, document: dict[str, Any]) -> None:
    """The JSON file, whole or not at all, and its row beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
    lines = (COLUMNS, ("---",) * len(COLUMNS), row(document))
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    file.with_suffix(".md").write_text(table + "\n", encoding="utf-8")


def row(document: dict[str, Any]) -> tuple[str, ...]:
    runs = document["runs"].values()
    epochs, num_run = document["epochs"], document["epochs_run"]
    return (
        max(run["date"] for run in runs),
        document["hardware"],
        document["torch"],
        f"{document['data']} {document['dataset_hash'][:8]}",
        str(epochs) if num_run == epochs else f"first {num_run} of {epochs}",
        ", ".join(sorted(document["runs"], key=int)),
        spread([100 * run["top1"] for run in runs], " %", 2),
        spread([run["training_seconds"] for run in runs], " s", 1),
        spread([run["first_step_seconds"] for run in runs], " s", 1),
    )


def spread(values: Sequence[float], unit: str, digits: int) -> str:
    """Mean and standard deviation of the sample, where there is more than one value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean + unit
    return f"{mean} ± {statistics.stdev(values):.{digits}f}{unit}"


# ------------------------------------------------------------------------------------------- main


def bring_in(arguments: argparse.Namespace, home: Path) -> ours.OurData:
    """The folder's images, or those of the built-in, which is downloaded if need be."""
    if arguments.data is None:
        source = IngestSpec(source="builtin", name="cifar10")
        return ours.bring_in(source, IMAGE_SIZE, home, get_settings())
    folder = arguments.data.resolve()
    settings = Settings(home=home, dataset_roots=(folder,), cpu_threads=arguments.threads)
    return ours.bring_in(IngestSpec(path=str(folder)), IMAGE_SIZE, home, settings)


def run_all(arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Trains the seeds that are missing; the document of all."""
    data = bring_in(arguments, home)
    spec = ours.recipe_spec(arguments.recipe, data)
    num_epochs = arguments.epochs_run or spec.epochs
    if num_epochs > spec.epochs:
        raise WrongUsage(f"--epochs-run {num_epochs}: the recipe has {spec.epochs} epochs")
    facts = facts_of(arguments, data, spec, num_epochs)
    file = result_file(arguments.results, facts)
    document = load(file, facts)
    for seed in arguments.seeds:
        if str(seed) in document["runs"]:
            print(f"seed {seed}: done before")
            continue
        seeded = spec.model_copy(update={"seed": seed})
        run = train_seed(arguments, data, seeded, num_epochs)
        date = datetime.now(UTC).date().isoformat()
        document["runs"][str(seed)] = {**asdict(run), "date": date}
        store(file, document)
        print(
            f"seed {seed}: top-1 {run.top1:.4f}, {run.training_seconds:.1f} s of training, "
            f"{run.first_step_seconds:.1f} s to the end of the first step "
            f"({run.precision}{', compiled' if run.compiled else ''})",
            flush=True,
        )
    return document


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--recipe", choices=list(TARGETS), default=next(iter(TARGETS)))
    made.add_argument("--data", type=Path, help="train/<class>/ and test/<class>/")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    made.add_argument("--epochs-run", type=int, help="of the schedule's epochs, the first ones")
    made.add_argument("--results", type=Path, default=RESULTS)
    made.add_argument("--threads", type=int, default=num_cores())
    return made


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    try:
        if arguments.data is not None and not arguments.data.is_dir():
            raise WrongUsage(f"--data {arguments.data}: there is no such folder")
        if arguments.epochs_run is not None and arguments.epochs_run < 1:
            raise WrongUsage("--epochs-run: at least 1")
        with tempfile.TemporaryDirectory(prefix="skipline-bench-") as home:
            document = run_all(arguments, Path(home))
    except (WrongUsage, SpecRefused) as error:
        parser().error(str(error))
    for name, cell in zip(COLUMNS, row(document), strict=True):
        print(f"{name:26}{cell}")
    is_whole = document["epochs_run"] == document["epochs"]
    mean = statistics.mean(run["top1"] for run in document["runs"].values())
    return 1 if is_whole and mean < TARGETS[arguments.recipe] else 0


if __name__ == "__main__":
    sys.exit(main())
