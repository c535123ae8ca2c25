"""One optimizer step after the other: all that learns, and how.

Knows batches and learning rates; nothing of epochs, validation, checkpoints or metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shared.vision.architectures import Network
from shared.vision.bundle import Weights
from shared.vision.preprocessing import Normalizer, Preprocessing
from shared.vision.transfer import freeze
from skipline.specs import TrainSpec
from worker.engine.augment import Augmentation
from worker.engine.data import Batch
from worker.engine.distributed import Ranks
from worker.engine.ema import AveragedModel
from worker.engine.optim import build_optimizer, set_lr
from worker.engine.runtime import Runtime, out_of_memory


class Learner:
    """A network that is being trained.

    Args:
        model: trained in place.
        num_images: of one step on this rank; `accumulate_steps` micro-batches make it up, and more
            of them once memory ran out.
    """

    def __init__(
        self,
        spec: TrainSpec,
        model: nn.Module,
        preprocessing: Preprocessing,
        runtime: Runtime,
        ranks: Ranks,
        num_images: int,
    ) -> None:
        device = runtime.torch_device
        self.spec, self.runtime, self.ranks = spec, runtime, ranks
        self.num_images = num_images
        self.accumulate_steps = spec.accumulate_steps
        model = model.to(device)
        if spec.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.model = ranks.synced(model, device)
        if spec.model.freeze:
            freeze(cast(Network, self.model), spec.model.freeze)
        self.model.train()
        self.augment = Augmentation(
            spec.augment, preprocessing.image_size, preprocessing.channel_mean
        )
        self.normalize = Normalizer(preprocessing, device, spec.channels_last)
        self.optimizer = build_optimizer(spec.optimizer, self.model)
        self.scaler = torch.amp.GradScaler(runtime.device, enabled=runtime.precision == "fp16")
        self.ema = AveragedModel(self.model, spec.ema_decay) if spec.ema_decay else None
        network = ranks.reducing(self.model, device)
        self.network = torch.compile(network) if runtime.compile else network
        self._reducing = network if isinstance(network, DistributedDataParallel) else None
        self._draws_while_running = bool(spec.model.dropout or spec.model.stochastic_depth)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]

    @property
    def served(self) -> nn.Module:
        """The network that is validated and stored: the average, where there is one."""
        return self.model if self.ema is None else self.ema.model

    def step(
        self, batch: Batch, draws: torch.Tensor, lr: float, seed: int, number: int
    ) -> torch.Tensor:
        """One optimizer step; `draws` are those of the batch's samples, `seed` is for what the
        network itself draws, `number` counts steps from 1.

        Returns the sums over the batch of loss and of right answers, float32 [2], on the device.

        Raises:
            torch.OutOfMemoryError: the weights have not changed, and `halve` makes another try
                smaller. (Batch norms may have counted a part of the batch already.)
            TrainingError: `cuda_out_of_memory`, where the parameters alone are too many.
        """
        set_lr(self.optimizer, lr)
        try:
            sums = self._backward(batch, draws, seed)
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            raise
        try:
            self._update()
        except torch.OutOfMemoryError as error:  # No smaller part of a batch would help.
            raise out_of_memory() from error
        if self.ema is not None:
            self.ema.update(number)
        return sums

    def _update(self) -> None:
        if self.spec.gradient_clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._trained, self.spec.gradient_clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, batch: Batch, draws: torch.Tensor, seed: int) -> torch.Tensor:
        num_images, length = len(batch.labels), self.part_size
        sums = torch.zeros(2, device=batch.labels.device)
        for place, start in enumerate(range(0, num_images, length)):
            rows = slice(start, start + length)
            if self._draws_while_running:
                place_in_step = self.ranks.rank * self.accumulate_steps + place
                _seed_device(batch.labels.device, seed + place_in_step)
            is_last = start + length >= num_images
            if self._reducing is None or is_last:
                sums += self._backward_part(batch, draws, rows)
            else:
                with self._reducing.no_sync():
                    sums += self._backward_part(batch, draws, rows)
        return sums

    def _backward_part(self, batch: Batch, draws: torch.Tensor, rows: slice) -> torch.Tensor:
        images, labels, part = batch.images[rows], batch.labels[rows], draws[rows]
        x = self.normalize(self.augment(images, part))
        x, targets = self.augment.mix(x, labels, part)
        with self.runtime.autocast():
            logits = self.network(x).float()
        loss = targets.loss(logits, self.spec.loss.label_smoothing)
        share = len(labels) / len(batch.labels)
        self.scaler.scale(loss if share == 1 else loss * share).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            num_right = (logits.argmax(dim=1) == labels).sum()
            return torch.stack((loss.detach() * len(labels), num_right))

    @property
    def part_size(self) -> int:
        """Images of a micro-batch; the last one of a step may have fewer."""
        return part_size(self.num_images, self.accumulate_steps, self.spec.part_unit)

    def halve(self) -> bool:
        """Cuts a step into twice as many micro-batches; False when they are single images, or
        single pairs that are mixed."""
        if self.part_size <= self.spec.part_unit:
            return False
        self.accumulate_steps *= 2
        return True

    # What a checkpoint holds.

    def weights(self) -> Weights:
        """Of the network that is validated and stored."""
        return self.served.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """All that `weights` leaves out."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "accumulate_steps": self.accumulate_steps,
            "live_weights": None if self.ema is None else dict(self.model.state_dict()),
        }

    def load(self, weights: Weights, state: Mapping[str, Any]) -> None:
        """Goes on from `weights()` and `state_dict()` of an earlier process."""
        self.served.load_state_dict(weights)
        if self.ema is not None:
            self.model.load_state_dict(state["live_weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        # More than stored where ranks began again, with smaller parts, since memory ran out.
        self.accumulate_steps = max(self.accumulate_steps, state["accumulate_steps"])


def part_size(num_images: int, num_parts: int, unit: int) -> int:
    """Images in each of at most `num_parts` parts: a multiple of `unit`."""
    return -(-num_images // (num_parts * unit)) * unit


def _seed_device(device: torch.device, seed: int) -> None:
    """Seeds what dropout draws from. `torch.manual_seed` seeds all there is, which takes 0.1 ms."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
