"""What a benchmark measured, against what it should be, on the screen and in a file."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """Something measured, and what it should at least or at most be."""

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_met(self) -> bool:
        too_little = self.at_least is not None and self.value < self.at_least
        too_much = self.at_most is not None and self.value > self.at_most
        return not (too_little or too_much)

    def __str__(self) -> str:
        goal = ""
        for word, limit in (("at least", self.at_least), ("at most", self.at_most)):
            if limit is not None:
                goal = f"   {word} {limit:g}: {'met' if self.is_met else 'MISSED'}"
        return f"{self.name:52} {self.value:10.4g} {self.unit}{goal}"


def quantiles(name: str, values: Sequence[float], unit: str, **goal: float) -> list[Figure]:
    """The median, on which the goal is, and the value that 95 % do not exceed."""
    ordered = sorted(values)
    highest = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    return [
        Figure(f"{name}, median", statistics.median(values), unit, **goal),
        Figure(f"{name}, 95 %", highest, unit),
    ]


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def write_figures(
    file: Path, facts: Mapping[str, str], measured: Mapping[str, Sequence[Figure]]
) -> None:
    """All figures by the part that they are of, with the date and `facts`, as JSON."""
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        **facts,
        "parts": {
            part: [asdict(figure) | {"is_met": figure.is_met} for figure in figures]
            for part, figures in measured.items()
        },
    }
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
