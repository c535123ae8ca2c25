"""Random crops and flips of a batch of bytes, on its device, one draw per image.

The draws of an epoch derive from (seed, epoch) and belong to samples, not to batches: whatever
the batch size and wherever training was resumed, an image is cut the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from skipline.catalog import CROP_PADDING_SHARE
from skipline.specs import AugmentName
from worker.engine.data import Purpose, epoch_generator


class Augmentation:
    """The spec's `augment`: `random_crop` pads with black by an eighth of the side and cuts a
    square of the old size anywhere; `horizontal_flip` mirrors every other image."""

    def __init__(self, names: Sequence[AugmentName], image_size: int) -> None:
        self._padding = image_size // CROP_PADDING_SHARE if "random_crop" in names else 0
        self._flips = "horizontal_flip" in names

    def draw(self, seed: int, epoch: int, num_samples: int) -> torch.Tensor:
        """int16 [num_samples, 3]: top and left of each sample's crop, 1 if it is mirrored."""
        generator = epoch_generator(seed, epoch, Purpose.augmentation)
        highest = [2 * self._padding, 2 * self._padding, int(self._flips)]
        draws = generator.integers(0, highest, (num_samples, 3), dtype=np.int16, endpoint=True)
        return torch.from_numpy(draws)

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Cuts images uint8 [B, S, S, 3] by their draws [B, 3], as one gather."""
        if not self._padding and not self._flips:
            return images
        batch_size, size, _, channels = images.shape
        if self._padding:
            inner = slice(self._padding, self._padding + size)
            side = size + 2 * self._padding
            padded = images.new_zeros((batch_size, side, side, channels))
            padded[:, inner, inner] = images
            images = padded
        top, left, mirrored = draws.long().unsqueeze(-1).unbind(1)  # [B, 1] each
        offsets = torch.arange(size, device=images.device)
        rows = top + offsets
        columns = left + torch.where(mirrored == 1, offsets.flip(0), offsets)
        samples = torch.arange(batch_size, device=images.device)
        return images[samples[:, None, None], rows[:, :, None], columns[:, None, :]]
