from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing import start_processes

from tests.worker.engine import two_ranks
from tests.worker.engine.tiny import Run, colored, run_fit
from tests.worker.engine.two_ranks import CANCELLED_AT, NUM_VAL, SPEC
from worker.engine.distributed import ALONE, Ranks


@dataclass(frozen=True)
class Ranked:
    """What each of two processes found."""

    first: dict[str, Any]
    second: dict[str, Any]


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Ranked:
    folder = tmp_path_factory.mktemp("ranks")
    start_processes(two_ranks.work, args=(str(folder),), nprocs=2, start_method="spawn")
    return Ranked(*(torch.load(folder / f"rank{rank}.pt") for rank in range(2)))


@pytest.fixture(scope="module")
def alone() -> Run:
    return run_fit(SPEC, num_val=NUM_VAL)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_synced_batch_norm_is_that_of_the_whole_batch(ranked: Ranked) -> None:
    whole = two_ranks.normalize(nn.BatchNorm2d(3), slice(None))
    first, second = ranked.first["norm"], ranked.second["norm"]
    for name in ("y", "x"):
        together = torch.cat([first[name], second[name]])
        torch.testing.assert_close(together, whole[name], rtol=1e-4, atol=1e-4)
    for name in ("weight", "bias"):  # These gradients are added up by who trains.
        torch.testing.assert_close(first[name] + second[name], whole[name], rtol=1e-4, atol=1e-3)
    for name in ("running.running_mean", "running.running_var", "running.num_batches_tracked"):
        torch.testing.assert_close(first[name], whole[name])
        assert torch.equal(first[name], second[name])


def test_two_processes_train_as_one_does_with_the_same_batch(ranked: Ranked, alone: Run) -> None:
    points = ranked.first["fit"]["points"]
    expected = alone.sink.reproducible_points()
    assert [point[:3] for point in points] == [point[:3] for point in expected]
    assert {point[0] for point in points} >= {"train_loss", "train_top1", "val_loss", "val_top1"}
    for (*_, value), (*_, wanted) in zip(points, expected, strict=True):
        assert value == pytest.approx(wanted, rel=1e-4)


def test_both_processes_end_with_the_same_weights(ranked: Ranked) -> None:
    for kind in ("weights", "stored"):
        assert_equal(ranked.first["fit"][kind], ranked.second["fit"][kind])
    assert ranked.first["fit"]["points"] == ranked.second["fit"]["points"]


def test_every_image_is_evaluated_once_and_every_process_knows_all(ranked: Ranked) -> None:
    expected = two_ranks.evaluated(ALONE)
    assert ranked.first["evaluated"]["labels"].tolist() == colored(NUM_VAL, 2).labels.tolist()
    for found in (ranked.first["evaluated"], ranked.second["evaluated"]):
        assert torch.equal(found["predicted"], expected["predicted"])
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-4, atol=1e-6)


def test_who_asks_the_first_process_to_end_reaches_both_at_the_same_step(ranked: Ranked) -> None:
    expected = {"events": ["Cancelled"], "num_steps": CANCELLED_AT - 1}
    assert ranked.first["cancelled"] == expected
    assert ranked.second["cancelled"] == expected


def test_released_processes_end_with_the_bits_of_uninterrupted_ones(ranked: Ranked) -> None:
    for results in (ranked.first, ranked.second):
        # Five steps, three looks of validation, three steps: within an epoch and a log window.
        assert results["released"] == {"events": ["Released"], "num_steps": 8}
        assert_equal(results["resumed"]["weights"], results["fit"]["weights"])
        assert_equal(results["resumed"]["stored"], results["fit"]["stored"])
        assert results["resumed"]["points"] == results["fit"]["points"]


def test_who_stops_the_first_process_stops_both_and_both_can_go_on(ranked: Ranked) -> None:
    for results in (ranked.first, ranked.second):
        assert (results["stopped"]["step"], results["stopped"]["reason"]) == (2, "user")
        assert [p[:2] for p in results["stopped"]["points"] if p[0] == "val_loss"] == [
            ("val_loss", 2)
        ]
        assert_equal(results["gone on"]["weights"], results["fit"]["weights"])


def test_one_process_needs_nobodys_consent() -> None:
    assert ALONE.agree(3) == 3
    assert ALONE.gather("mine") == ["mine"]
    values = torch.ones(2)
    assert ALONE.sum_(values) is values
    model = nn.BatchNorm2d(2)
    assert ALONE.synced(model, torch.device("cpu")) is model
    assert type(model) is nn.BatchNorm2d
    assert ALONE.reducing(model, torch.device("cpu")) is model
    assert (ALONE.is_first, Ranks(1, 2).is_first) == (True, False)
