"""A loaded network that answers with probabilities. Knows nothing of HTTP, caches or batching."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from shared.vision.bundle import Bundle, Weights, restore_model
from shared.vision.folding import fold
from shared.vision.preprocessing import Normalizer


@dataclass(frozen=True)
class Look:
    """`heat`: float32 [B, S, S] in [0, 1], where the answer comes from; all 0 where nothing speaks
    for it. `features`: float32 [B, K], the last feature map's means."""

    heat: npt.NDArray[np.float32]
    features: npt.NDArray[np.float32]


class Predictor:
    """Serves one bundle in float32 on one device, with its batch norms folded: logits are those of
    the network as it was trained to 1e-5 of the largest. Calls from several threads are safe.

    Raises:
        CheckpointCorrupt: the weights are not of the bundle's network.
    """

    def __init__(self, bundle: Bundle, weights: Weights, device: str = "cpu") -> None:
        self.bundle = bundle
        self.num_bytes = sum(weight.nbytes for weight in weights.values())
        """Memory that the weights take."""
        self._device = torch.device(device)
        self._model = fold(restore_model(bundle, weights, self._device))
        self._normalize = Normalizer(bundle.preprocessing, self._device, bundle.spec.channels_last)

    def predict(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Probabilities float32 [B, num_classes] of images uint8 [B, S, S, 3]."""
        with torch.inference_mode():
            batch = torch.from_numpy(images).to(self._device)
            logits: torch.Tensor = self._model(self._normalize(batch))
            probabilities: npt.NDArray[np.float32] = logits.softmax(dim=1).cpu().numpy()
        return probabilities

    def look(self, images: npt.NDArray[np.uint8]) -> Look:
        """What in these images, uint8 [B, S, S, 3], makes the network answer as it does, and what
        it sees in them.

        Grad-CAM (Selvaraju et al., 2017): the last feature map's channels, weighted by how much
        each one raises the answer, and of their sum what is positive.
        """
        with torch.no_grad():
            batch = torch.from_numpy(images).to(self._device)
            maps = self._model.feature_map(self._normalize(batch))
        maps = maps.detach().requires_grad_()
        with torch.enable_grad():
            best = self._model.classify(maps).amax(dim=1)
            (slopes,) = torch.autograd.grad(best.sum(), maps)
        with torch.no_grad():
            heat = (slopes.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True).relu()
            heat = heat / heat.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
            heat = functional.interpolate(heat, images.shape[1:3], mode="bilinear")[:, 0]
            features = maps.mean(dim=(2, 3))
        return Look(heat.cpu().numpy(), features.detach().cpu().numpy())
