"""The network that every server of this folder serves, and how an image becomes its answer, as
somebody who serves a model of torchvision's writes it. Knows nothing of Skipline, nor of HTTP.

`MODEL_FILE`: the state dict of a ResNet-18 for small images, as safetensors.
"""

from __future__ import annotations

import os
from io import BytesIO
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import nn

SIZE = 32
MAX_BATCH = 64
MEAN = STD = 0.5


def load() -> nn.Module:
    """The network in eval mode."""
    network = torchvision.models.resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    network.load_state_dict(load_file(os.environ["MODEL_FILE"]))
    return network.eval()


def pixels(data: bytes) -> torch.Tensor:
    """Of an image's file, float32 [3, S, S]."""
    return pixels_of(Image.open(BytesIO(data)))


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """float32 [3, S, S]."""
    square = picture.convert("RGB").resize((SIZE, SIZE))
    values = torch.from_numpy(np.array(square)).permute(2, 0, 1).float()
    return (values / 255 - MEAN) / STD


@torch.inference_mode()
def classify(network: nn.Module, images: list[torch.Tensor]) -> list[dict[str, Any]]:
    """The five best classes of each."""
    shares = network(torch.stack(images)).softmax(dim=1)
    best = shares.topk(5, dim=1)
    return [
        {"labels": labels, "probabilities": probabilities}
        for labels, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
