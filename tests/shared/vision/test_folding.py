"""A network with folded batch norms answers as it did with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shared.vision.architectures import build_model
from shared.vision.folding import fold
from skipline.catalog import ARCHITECTURES
from skipline.specs import ModelSpec


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_architecture_answers_the_same_without_its_norms(arch: str) -> None:
    torch.manual_seed(0)
    network = build_model(ModelSpec(arch=arch), 10, 64).eval()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):  # as if it had been trained: no norm is the identity
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.1)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = network(images)
        folded = fold(network)
        logits = folded(images)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_norm_folded_into_its_convolution_by_hand() -> None:
    # y = (2 x - 1) / sqrt(3 + 1) * 4 + 5 = 4 x + 3
    convolution = nn.Conv2d(1, 1, kernel_size=1, bias=False)
    norm = nn.BatchNorm2d(1, eps=1.0)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        convolution.weight.fill_(2)
        norm.running_mean.fill_(1)
        norm.running_var.fill_(3)
        norm.weight.fill_(4)
        norm.bias.fill_(5)
    folded = fold(nn.Sequential(convolution, norm).eval())  # type: ignore[arg-type]
    assert folded[0].weight.item() == pytest.approx(4)  # type: ignore[index]
    assert folded[0].bias.item() == pytest.approx(3)  # type: ignore[index]
    assert isinstance(folded[1], nn.Identity)  # type: ignore[index]
