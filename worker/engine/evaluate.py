"""What a network says of every image of a split; `worker.engine.report` makes a report of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from shared.vision.bundle import Bundle, Weights, restore_model
from shared.vision.preprocessing import Normalizer
from worker.engine.data import DeviceData, Rows, SplitData
from worker.engine.distributed import ALONE, Ranks
from worker.engine.runtime import Runtime, typed_failures

TOP_K = 5
"""`top5` counts the best min(5, num_classes) answers."""
MAX_LOGITS = 2**24
"""Kept of an evaluation: of the images of more, evenly chosen ones."""

BeforeBatch = Callable[[int, int], object]
"""Called before each batch with the number of batches done and in all; may raise to end early."""


@dataclass(frozen=True)
class Evaluation:
    """What became of each image, in the order of the split: label int64 [N], answer int64 [N],
    cross-entropy without label smoothing float32 [N], label among the best five bool [N], the
    answer's probability float32 [N]. Of every so-manieth image, all of them if that is not too
    much, also the logits float32 [M, C], with the label int64 [M]."""

    labels: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float32]
    in_top5: npt.NDArray[np.bool_]
    confidences: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]
    logit_labels: npt.NDArray[np.int64]

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
    results, kept = [], []
    with torch.inference_mode():
        for done, batch in enumerate(data.batches(batches)):
            before_batch(done, len(batches))
            with runtime.autocast():
                logits = model(normalize(batch.images)).float()
            losses = functional.cross_entropy(logits, batch.labels, reduction="none")
            best = logits.topk(min(TOP_K, logits.shape[1]), dim=1).indices
            hits = best == batch.labels[:, None]
            confidences = logits.softmax(dim=1).amax(dim=1)
            results.append((batch.labels, best[:, 0], losses, hits.any(dim=1), confidences))
            # Images are chosen by their place in the share, of which batches are runs.
            stride = max(1, len(data) * logits.shape[1] // MAX_LOGITS)
            first = done * len(best)
            end = min(len(best), len(samples) - first)
            chosen = slice(-first % stride, max(end, 0), stride)
            kept.append((logits[chosen].clone(), batch.labels[chosen]))
        columns = [torch.cat(column)[: len(samples)] for column in zip(*results, strict=True)]
        columns += [torch.cat(column) for column in zip(*kept, strict=True)]
        return [column.cpu().numpy() for column in columns]


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
