"""How good a network is on a split: what it said of every image, and the report made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from shared.vision.bundle import Bundle, Weights, restore_model
from shared.vision.preprocessing import Normalizer
from skipline.schemas import ClassReport, Report
from worker.engine.data import DeviceData, Rows, SplitData
from worker.engine.distributed import ALONE, Ranks
from worker.engine.runtime import Runtime, typed_failures

TOP_K = 5
"""`top5` counts the best min(5, num_classes) answers."""

BeforeBatch = Callable[[int, int], object]
"""Called before each batch with the number of batches done and in all; may raise to end early."""


@dataclass(frozen=True)
class Evaluation:
    """What became of each image, in the order of the split: label int64 [N], answer int64 [N],
    cross-entropy without label smoothing float32 [N], label among the best five bool [N]."""

    labels: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float32]
    in_top5: npt.NDArray[np.bool_]

    @property
    def loss(self) -> float:
        return float(self.losses.mean(dtype=np.float64))

    @property
    def top1(self) -> float:
        return float((self.predicted == self.labels).mean())

    @property
    def top5(self) -> float:
        return float(self.in_top5.mean())


def evaluate(
    model: nn.Module,
    data: DeviceData,
    normalize: Normalizer,
    runtime: Runtime,
    *,
    batch_size: int,
    before_batch: BeforeBatch,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Runs the model in eval mode over all images and leaves its parts in the mode they were in.

    All batches have one shape, `batch_size` or a little less: the last is filled up and what was
    added is cut off again. Each rank takes an equal share, and all of them get the whole result.
    The device is read once, at the end. Out of memory, it tries again with half a batch.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        while True:
            try:
                columns = _answers(model, data, normalize, runtime, batch_size, before_batch, ranks)
                break
            except torch.OutOfMemoryError:
                if ranks.size > 1 or batch_size == 1:
                    raise
            torch.cuda.empty_cache()
            batch_size //= 2
    finally:
        for module, was_training in modes.items():
            module.training = was_training
    shares = ranks.gather(columns)
    return Evaluation(*(np.concatenate(parts) for parts in zip(*shares, strict=True)))


def _answers(
    model: nn.Module,
    data: DeviceData,
    normalize: Normalizer,
    runtime: Runtime,
    batch_size: int,
    before_batch: BeforeBatch,
    ranks: Ranks,
) -> list[npt.NDArray[Any]]:
    """The columns of an `Evaluation` for this rank's share of the images."""
    samples, batches = even_batches(len(data), batch_size, ranks)
    results = []
    with torch.inference_mode():
        for done, batch in enumerate(data.batches(batches)):
            before_batch(done, len(batches))
            with runtime.autocast():
                logits = model(normalize(batch.images)).float()
            losses = functional.cross_entropy(logits, batch.labels, reduction="none")
            best = logits.topk(min(TOP_K, logits.shape[1]), dim=1).indices
            hits = best == batch.labels[:, None]
            results.append((batch.labels, best[:, 0], losses, hits.any(dim=1)))
        return [
            torch.cat(column)[: len(samples)].cpu().numpy() for column in zip(*results, strict=True)
        ]


def even_batches(num_samples: int, batch_size: int, ranks: Ranks) -> tuple[Rows, list[Rows]]:
    """This rank's samples (int64 [n]), and the same in batches of one size, filled up with the
    first sample. Every rank has as many batches."""
    share = -(-num_samples // ranks.size)
    samples = np.arange(ranks.rank * share, min((ranks.rank + 1) * share, num_samples))
    num_batches = -(-share // batch_size)
    length = -(-share // num_batches)
    padded = np.zeros(num_batches * length, dtype=np.int64)
    padded[: len(samples)] = samples
    return samples, list(padded.reshape(num_batches, length))


def evaluate_bundle(
    bundle: Bundle,
    weights: Weights,
    data: SplitData,
    runtime: Runtime,
    *,
    batch_size: int,
    before_batch: BeforeBatch,
) -> Evaluation:
    """Evaluates a stored network with its own preprocessing.

    Raises:
        CheckpointCorrupt: the weights are not of the bundle's network.
        TrainingError: `cuda_out_of_memory`.
    """
    device = runtime.torch_device
    with typed_failures():
        return evaluate(
            restore_model(bundle, weights, device),
            DeviceData(data, device),
            Normalizer(bundle.preprocessing, device, bundle.spec.channels_last),
            runtime,
            batch_size=batch_size,
            before_batch=before_batch,
        )


def build_report(
    evaluation: Evaluation,
    classes: Sequence[str],
    *,
    dataset: str,
    dataset_id: str,
    split: Literal["train", "val", "test"],
    selected_on: Literal["val", "test"] | None = None,
    checkpoint_id: str | None = None,
) -> Report:
    """The report of an evaluation. Classes without images do not enter the mean accuracy."""
    confusion = confusion_matrix(evaluation, len(classes))
    per_class = [_class_report(label, confusion, index) for index, label in enumerate(classes)]
    return Report(
        dataset=dataset,
        dataset_id=dataset_id,
        split=split,
        selected_on=selected_on,
        checkpoint_id=checkpoint_id,
        num_samples=len(evaluation.labels),
        loss=evaluation.loss,
        top1=evaluation.top1,
        top5=evaluation.top5,
        mean_class_accuracy=float(np.mean([c.accuracy for c in per_class if c.num_samples])),
        per_class=per_class,
        confusion=confusion.tolist(),
    )


def confusion_matrix(evaluation: Evaluation, num_classes: int) -> npt.NDArray[np.int64]:
    """int64 [C, C]: at [i, j] the number of images of class i that were called j."""
    cells = evaluation.labels * num_classes + evaluation.predicted
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def _class_report(label: str, confusion: npt.NDArray[np.int64], index: int) -> ClassReport:
    """Recall is the class's accuracy; what would be 0 / 0 is 0."""
    hits = int(confusion[index, index])
    num_samples, num_called = int(confusion[index].sum()), int(confusion[:, index].sum())
    recall = hits / num_samples if num_samples else 0.0
    return ClassReport(
        label=label,
        num_samples=num_samples,
        accuracy=recall,
        precision=hits / num_called if num_called else 0.0,
        recall=recall,
        f1=2 * hits / (num_samples + num_called) if num_samples + num_called else 0.0,
    )
