"""A loaded network that answers with probabilities. Knows nothing of HTTP, caches or batching."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from shared.vision.bundle import Bundle, Weights, restore_model
from shared.vision.preprocessing import Normalizer


class Predictor:
    """Serves one bundle in float32 on one device. Calls from several threads are safe.

    Raises:
        CheckpointCorrupt: the weights are not of the bundle's network.
    """

    def __init__(self, bundle: Bundle, weights: Weights, device: str = "cpu") -> None:
        self.bundle = bundle
        self.num_bytes = sum(weight.nbytes for weight in weights.values())
        """Memory that the weights take."""
        self._device = torch.device(device)
        self._model = restore_model(bundle, weights, self._device)
        self._normalize = Normalizer(bundle.preprocessing, self._device, bundle.spec.channels_last)

    def predict(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Probabilities float32 [B, num_classes] of images uint8 [B, S, S, 3]."""
        with torch.inference_mode():
            batch = torch.from_numpy(images).to(self._device)
            logits: torch.Tensor = self._model(self._normalize(batch))
            probabilities: npt.NDArray[np.float32] = logits.softmax(dim=1).cpu().numpy()
        return probabilities
