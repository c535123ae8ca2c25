"""Several processes that train one network together, each on its share of every batch.

Ranks agree before every step on what to do next, reduce gradients (torch's
DistributedDataParallel) and batch-norm statistics, and share out an evaluation. So the curve is
that of one process with the same batch, up to the order in which floats are added. How the
processes come into being is not known here.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among its equals: `rank` of 0 ... size - 1. Every method is called by all of
    them at the same place of their work."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """The one that reports and stores."""
        return self.rank == 0

    def agree(self, wish: int) -> int:
        """The wish of the first rank."""
        if self.size == 1:
            return wish
        agreed = torch.tensor([wish])
        distributed.broadcast(agreed, src=0)
        return int(agreed)

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        """Adds the ranks' values up, in place."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def gather(self, item: T) -> list[T]:
        """The items of all ranks, in their order."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        distributed.all_gather_object(items, item)
        return items

    def synced(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with batch norms that normalize over the whole batch, not a rank's share."""
        if self.size == 1:
            return model
        if device.type == "cuda":
            synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
            return cast(nn.Module, synced)
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SyncedBatchNorm2d
        return model

    def reducing(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with gradients that are means over the ranks, for training steps only."""
        if self.size == 1:
            return model
        with warnings.catch_warnings():
            # Newer torch has another word for it, which older ones do not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            # The buffers are equal already, and the trainer decides what is not used.
            return DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )


ALONE = Ranks()
"""One process, which needs nobody's consent."""


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all ranks, which hold equally many. Torch's own SyncBatchNorm
    does not compute on the CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(input)
        x = input.float()
        mean = _mean_over_ranks(x.mean(dim=(0, 2, 3)))
        centred = x - mean.view(1, -1, 1, 1)
        variance = _mean_over_ranks(centred.square().mean(dim=(0, 2, 3)))
        self._follow(mean.detach(), variance.detach(), x.numel() // x.shape[1])
        scale = torch.rsqrt(variance + self.eps) * self.weight
        y = centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return y.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: torch.Tensor, variance: torch.Tensor, num_values: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        total = num_values * distributed.get_world_size()
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (total / max(1, total - 1)), self.momentum)
        self.num_batches_tracked += 1


def _mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    total = cast(torch.Tensor, _Sum.apply(values))
    return total / distributed.get_world_size()


class _Sum(torch.autograd.Function):
    """The sum over ranks. Its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].clone()
        distributed.all_reduce(total)
        return total
