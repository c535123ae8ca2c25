"""A loaded network that answers with probabilities. Knows nothing of HTTP, caches or batching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from shared.vision.architectures import Network
from shared.vision.bundle import Bundle, Weights, restore_model
from shared.vision.folding import fold
from shared.vision.preprocessing import Normalizer

if TYPE_CHECKING:
    import onnxruntime


@dataclass(frozen=True)
class Look:
    """`heat`: float32 [B, S, S] in [0, 1], where the answer comes from; all 0 where nothing speaks
    for it. `features`: float32 [B, K], the last feature map's means."""

    heat: npt.NDArray[np.float32]
    features: npt.NDArray[np.float32]


class Predictor:
    """Serves one bundle in float32 on one device, with its batch norms folded: logits are those of
    the network as it was trained to 1e-5 of the largest. Used by one thread at a time.

    Args:
        reload: gives the weights once more, so that they need not be kept for `look` alone.

    Raises:
        CheckpointCorrupt: the weights are not of the bundle's network.
    """

    def __init__(
        self,
        bundle: Bundle,
        weights: Weights,
        device: str = "cpu",
        reload: Callable[[], Weights] | None = None,
    ) -> None:
        self.bundle = bundle
        self._num_weight_bytes = sum(weight.nbytes for weight in weights.values())
        self._device = torch.device(device)
        self._reload = reload
        self._model: Network | None = fold(restore_model(bundle, weights, self._device))
        self._session: onnxruntime.InferenceSession | None = None
        self._normalize = Normalizer(bundle.preprocessing, self._device, bundle.spec.channels_last)

    def predict(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Probabilities float32 [B, num_classes] of images uint8 [B, S, S, 3]."""
        probabilities: npt.NDArray[np.float32]
        if self._session is not None:
            [probabilities] = self._session.run(None, {"images": images})
            return probabilities
        with torch.inference_mode():
            batch = torch.from_numpy(images).to(self._device)
            logits: torch.Tensor = self._network()(self._normalize(batch))
            probabilities = logits.softmax(dim=1).cpu().numpy()
        return probabilities

    def accelerate(self, path: Path) -> None:
        """Lets onnxruntime answer from now on, with what `shared.vision.portable` has made of this
        very bundle: probabilities are the same to 1e-5. Raises what onnxruntime raises for a file
        that it cannot use."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that spin while they wait take the cores from what decodes and answers.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(path, options)
        if self._reload is not None:
            self._model = None

    @property
    def backend(self) -> Literal["torch", "onnxruntime"]:
        """What computes `predict`."""
        return "torch" if self._session is None else "onnxruntime"

    @property
    def num_bytes(self) -> int:
        """Memory that the weights take."""
        copies = (self._model is not None) + (self._session is not None)
        return copies * self._num_weight_bytes

    def _network(self) -> Network:
        if self._model is None:
            assert self._reload is not None, "it was let go of for that reason"
            self._model = fold(restore_model(self.bundle, self._reload(), self._device))
        return self._model

    def look(self, images: npt.NDArray[np.uint8]) -> Look:
        """What in these images, uint8 [B, S, S, 3], makes the network answer as it does, and what
        it sees in them.

        Grad-CAM (Selvaraju et al., 2017): the last feature map's channels, weighted by how much
        each one raises the answer, and of their sum what is positive.
        """
        network = self._network()
        with torch.no_grad():
            batch = torch.from_numpy(images).to(self._device)
            maps = network.feature_map(self._normalize(batch))
        maps = maps.detach().requires_grad_()
        with torch.enable_grad():
            best = network.classify(maps).amax(dim=1)
            (slopes,) = torch.autograd.grad(best.sum(), maps)
        with torch.no_grad():
            heat = (slopes.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True).relu()
            heat = heat / heat.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
            heat = functional.interpolate(heat, images.shape[1:3], mode="bilinear")[:, 0]
            features = maps.mean(dim=(2, 3))
        return Look(heat.cpu().numpy(), features.detach().cpu().numpy())
