from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from shared.vision.preprocessing import Normalizer, Preprocessing
from tests.worker.engine.tiny import Hungry
from worker.engine import evaluate as evaluate_module
from worker.engine.data import ArrayData, DeviceData
from worker.engine.distributed import Ranks
from worker.engine.evaluate import Evaluation, evaluate, even_batches
from worker.engine.runtime import Runtime

CPU = torch.device("cpu")
RUNTIME = Runtime("cpu", "fp32", 1)
BYTES = Preprocessing(image_size=1, channel_mean=(0, 0, 0), channel_std=(1, 1, 1))


class Brightest(nn.Module):
    """Scores class c by one pixel's red minus c tenths, as log-probabilities would be."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.levels = torch.arange(num_classes) / 10

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -(x[:, :1, 0, 0] - self.levels).abs() * 100


def reds(levels: list[float], labels: list[int]) -> DeviceData:
    images = np.zeros((len(levels), 1, 1, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.round(np.array(levels) * 255)
    return DeviceData(ArrayData(images, np.array(labels)), CPU)


def run(
    data: DeviceData, num_classes: int, batch_size: int, model: nn.Module | None = None
) -> Evaluation:
    return evaluate(
        model or Brightest(num_classes),
        data,
        Normalizer(BYTES, CPU),
        RUNTIME,
        batch_size=batch_size,
        before_batch=lambda done, total: None,
    )


def test_answers_and_hits_are_counted_per_image() -> None:
    # The answers are classes 0, 1, 9; of class 6's image the best five are 7, 8, 9, 5, 6 at 0.9.
    evaluation = run(reds([0.0, 0.1, 0.9], [0, 2, 3]), num_classes=10, batch_size=2)
    assert evaluation.predicted.tolist() == [0, 1, 9]
    assert evaluation.in_top5.tolist() == [True, True, False]
    assert evaluation.top1 == pytest.approx(1 / 3)
    assert evaluation.top5 == pytest.approx(2 / 3)


def test_with_few_classes_every_answer_is_among_the_best_five() -> None:
    assert run(reds([0.0, 0.1], [1, 0]), num_classes=3, batch_size=2).top5 == 1


def test_the_ragged_last_batch_counts() -> None:
    data = reds([0.0, 0.1, 0.2, 0.3, 0.4], [0, 1, 2, 3, 4])
    whole, cut = run(data, 5, batch_size=5), run(data, 5, batch_size=2)
    assert len(cut.labels) == 5
    assert cut.top1 == 1
    np.testing.assert_allclose(cut.losses, whole.losses, rtol=1e-6)


def test_the_loss_is_the_mean_cross_entropy() -> None:
    evaluation = run(reds([0.0], [1]), num_classes=2, batch_size=1)
    assert evaluation.loss == pytest.approx(10 + math.log1p(math.exp(-10)), rel=1e-5)


def test_evaluation_leaves_the_model_in_its_mode_and_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    looks: list[tuple[int, int]] = []
    evaluate(
        model,
        reds([0.0, 0.5, 0.7], [0, 1, 1]),
        Normalizer(BYTES, CPU),
        RUNTIME,
        batch_size=2,
        before_batch=lambda done, total: looks.append((done, total)),
    )
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert looks == [(0, 2), (1, 2)]


def test_the_answers_probability_and_the_logits_are_kept() -> None:
    evaluation = run(reds([0.0, 0.1, 0.1], [0, 1, 0]), num_classes=2, batch_size=2)
    sure = 1 / (1 + math.exp(-10))
    assert evaluation.confidences.tolist() == pytest.approx([sure] * 3, rel=1e-5)
    gaps = evaluation.logits[:, 0] - evaluation.logits[:, 1]
    assert gaps.tolist() == pytest.approx([10, -10, -10], rel=1e-4)
    assert evaluation.logit_labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 64])
def test_of_too_many_logits_those_of_every_so_manieth_image_are_kept(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module, "MAX_LOGITS", 7)  # of 11 x 2: every third image's
    labels = [0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    levels = [place / 100 for place in range(11)]
    evaluation = run(reds(levels, labels), num_classes=2, batch_size=batch_size)
    whole = -np.abs(np.round(np.array(levels[::3]) * 255) / 255 - 0.1) * 100
    np.testing.assert_allclose(evaluation.logits[:, 1], whole, atol=1e-4)
    assert evaluation.logit_labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "shapes"),
    [(10, 4, [4, 4, 4]), (9, 4, [3, 3, 3]), (8, 4, [4, 4]), (7, 64, [7]), (1, 4, [1])],
)
def test_all_batches_have_one_shape(num_samples: int, batch_size: int, shapes: list[int]) -> None:
    model = Hungry(Brightest(2), capacity=64)
    evaluation = run(reds([0.1] * num_samples, [1] * num_samples), 2, batch_size, model)
    assert model.sizes == shapes
    assert len(evaluation.labels) == num_samples


def test_what_fills_up_the_last_batch_does_not_count() -> None:
    # It is filled up with the first image, the only wrong answer.
    evaluation = run(reds([0.0, 0.1, 0.1], [1, 1, 1]), num_classes=2, batch_size=2)
    assert evaluation.predicted.tolist() == [0, 1, 1]
    assert evaluation.top1 == pytest.approx(2 / 3)
    missed, hit = 10 + math.log1p(math.exp(-10)), math.log1p(math.exp(-10))
    assert evaluation.loss == pytest.approx((missed + 2 * hit) / 3, rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [1, 2, 5, 7, 10, 12])
def test_ranks_share_out_every_image_once(num_samples: int, size: int) -> None:
    shares = [even_batches(num_samples, 2, Ranks(rank, size)) for rank in range(size)]
    assert [i for samples, _ in shares for i in samples.tolist()] == list(range(num_samples))
    for samples, batches in shares:
        assert np.concatenate(batches)[: len(samples)].tolist() == samples.tolist()
    # Every rank has as many batches, and all are of one size.
    assert len({len(batches) for _, batches in shares}) == 1
    assert len({len(batch) for _, batches in shares for batch in batches}) == 1
    assert all(len(batch) <= 2 for _, batches in shares for batch in batches)


def test_ranks_share_out_as_worked_out() -> None:
    first, second = (even_batches(5, 2, Ranks(rank, 2)) for rank in range(2))
    assert (first[0].tolist(), [b.tolist() for b in first[1]]) == ([0, 1, 2], [[0, 1], [2, 0]])
    assert (second[0].tolist(), [b.tolist() for b in second[1]]) == ([3, 4], [[3, 4], [0, 0]])


def test_out_of_memory_evaluation_tries_half_a_batch() -> None:
    data = reds([0.0, 0.1, 0.2, 0.3, 0.4], [0, 1, 2, 3, 3])
    whole = run(data, 5, batch_size=5)
    model = Hungry(Brightest(5), capacity=1)
    halved = run(data, 5, batch_size=5, model=model)
    assert model.sizes == [1] * 5  # after five and two at once did not fit
    np.testing.assert_array_equal(halved.predicted, whole.predicted)
    np.testing.assert_allclose(halved.losses, whole.losses, rtol=1e-6)


def test_a_single_image_that_does_not_fit_is_an_error_and_leaves_the_mode() -> None:
    model = Hungry(Brightest(2), capacity=0).train()
    with pytest.raises(torch.OutOfMemoryError):
        run(reds([0.0, 0.1], [0, 1]), 2, batch_size=2, model=model)
    assert model.training
