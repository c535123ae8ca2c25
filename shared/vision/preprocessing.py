"""From squares of pixels to what a network sees: the same for training and prediction.

    uint8 [B, S, S, 3] --Normalizer--> float32 [B, 3, S, S]

Runs on a batch, on its device; how files become squares is in `shared.images`. Knows nothing of
datasets or networks.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

Channels = tuple[float, float, float]


class Preprocessing(BaseModel):
    """What a network expects. `image_size` in pixels; mean and standard deviation of red, green
    and blue over the training split, for values scaled to [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    image_size: Annotated[int, Field(gt=0)]
    channel_mean: Channels
    channel_std: Channels


class Normalizer:
    """Brings batches of bytes to zero mean and unit variance a channel, on their device.

    uint8 [B, S, S, 3] becomes float32 [B, 3, S, S], in channels-last memory (which is how the
    bytes lie already) unless `channels_last` is false.
    """

    def __init__(
        self, preprocessing: Preprocessing, device: torch.device, channels_last: bool = True
    ) -> None:
        mean = torch.tensor(preprocessing.channel_mean)
        # A channel without variance has no scale of its own: one level of 8 bits stands in.
        std = torch.tensor(preprocessing.channel_std).clamp(min=1 / 255)
        self._scale = (1 / (255 * std)).view(1, 3, 1, 1).to(device)
        self._shift = (-mean / std).view(1, 3, 1, 1).to(device)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        x = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=self._memory_format)
        return x.mul_(self._scale).add_(self._shift)
