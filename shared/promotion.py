"""What a model has to prove before an alias may stand for it.

Read from stored reports, so that a promotion answers at once: it evaluates nothing itself.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from shared import datasets, repository
from shared.errors import InvalidInput, ModelNotFound, PromotionRefused
from shared.tables import Checkpoint, Dataset
from skipline import schemas

MAX_FLOORS = 20
_FLOOR = re.compile(r"\s*([a-z0-9_]+)\s*(>=|<=)\s*([0-9]+(?:\.[0-9]+)?)\s*", re.ASCII)
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}
_MEASURES: Mapping[str, Callable[[schemas.Report], float | None]] = {
    "top1": lambda report: report.top1,
    "top5": lambda report: report.top5,
    "mean_class_accuracy": lambda report: report.mean_class_accuracy,
    "min_class_accuracy": lambda report: min(c.accuracy for c in report.per_class if c.num_samples),
    "loss": lambda report: report.loss,
    "ece": lambda report: report.calibration.ece if report.calibration else None,
}
_SMALLER_IS_BETTER = frozenset({"loss", "ece"})


@dataclass(frozen=True)
class Floor:
    """A bound that a figure of the report must keep: `bound` is in the figure's own unit, for
    accuracies fractions in [0, 1]."""

    name: str
    relation: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name} {self.relation} {self.bound:g}"


@dataclass(frozen=True)
class Guard:
    """What is asked of a model.

    Args:
        floors: of its report.
        against: another model, than which it must be no worse in any figure of `floors`, nor in
            top-1, on the same images.
        dataset, split: the images; by default those that it was trained for, and their split
            `test`, else `val`.
    """

    floors: Sequence[Floor] = ()
    against: str | None = None
    dataset: str | None = None
    split: str | None = None


def parse_floors(text: str) -> list[Floor]:
    """Of `top1>=0.93,min_class_accuracy>=0.8`. Raises `InvalidInput`."""
    floors: list[Floor] = []
    for part in text.split(","):
        match = _FLOOR.fullmatch(part)
        if match is None or match[1] not in _MEASURES or len(floors) == MAX_FLOORS:
            message = (
                f"Give at most {MAX_FLOORS} conditions like top1>=0.93, with commas between them, "
                f"on {', '.join(_MEASURES)}"
            )
            raise InvalidInput(message, errors=[{"loc": "require", "message": message}])
        floors.append(Floor(match[1], match[2], float(match[3])))
    return floors


def check(session: Session, guard: Guard, alias: str, checkpoint: Checkpoint) -> None:
    """Lets the checkpoint through, or not.

    Raises:
        PromotionRefused: it does not keep a floor, or is worse than the other model; `errors` says
            in which figures, and by how much.
        NotEvaluated: it has no report on these images, or the other model has none.
        DatasetNotFound, ModelNotFound, NoCheckpointYet: for what the guard names.
        InvalidInput: the dataset has no such split.
    """
    dataset, split = _images(session, guard, checkpoint)
    report = repository.report_on(session, checkpoint, dataset, split)
    where = f"on {dataset.name}/{split}"
    errors = []
    for floor in guard.floors:
        value = _MEASURES[floor.name](report)
        if value is None or not _COMPARE[floor.relation](value, floor.bound):
            told = "unknown" if value is None else f"{value:.6g}"
            message = f"It is {told} {where}; {floor} is required"
            errors.append({"loc": floor.name, "message": message})
    other = _other(session, guard.against, alias)
    if other is not None and other.id != checkpoint.id:
        theirs = repository.report_on(session, other, dataset, split)
        errors += _worse(report, theirs, guard, where)
    if errors:
        detail = "; ".join(f"{error['loc']}: {error['message']}" for error in errors)
        raise PromotionRefused(f"{alias} stays what it is. {detail}", errors=errors)


def _images(session: Session, guard: Guard, checkpoint: Checkpoint) -> tuple[Dataset, str]:
    reference = guard.dataset or repository.get_job(session, checkpoint.job_id).dataset_id
    return datasets.get_split(session, reference, guard.split)


def _other(session: Session, against: str | None, alias: str) -> Checkpoint | None:
    """The model to be compared with; None where there is none, as for the first one of an alias."""
    if against is None:
        return None
    try:
        return repository.find_model(session, against)
    except ModelNotFound:
        if against == alias:
            return None
        raise


def _worse(
    report: schemas.Report, other: schemas.Report, guard: Guard, where: str
) -> list[dict[str, str]]:
    errors = []
    for name in dict.fromkeys(["top1", *(floor.name for floor in guard.floors)]):
        mine, theirs = _MEASURES[name](report), _MEASURES[name](other)
        if mine is None or theirs is None:
            continue  # A floor on it has failed already, or the other model's is not known.
        if mine > theirs if name in _SMALLER_IS_BETTER else mine < theirs:
            message = f"It is {mine:.6g} {where}, and {theirs:.6g} for {guard.against}"
            errors.append({"loc": name, "message": message})
    return errors
