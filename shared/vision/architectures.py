"""Networks from a spec: torchvision's ResNets and VGGs, with a stem or head for small images.

Never downloads weights. Keys of the state dict are torchvision's, except for the one-layer head
of a VGG for small images. Importing torchvision costs about a second of a bare process, most of
it torch's compiler, which `torch.optim` imports anyway.
"""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import get_model
from torchvision.models.resnet import ResNet
from torchvision.models.vgg import VGG, cfgs, make_layers

from skipline.catalog import ARCHITECTURES, MAX_SMALL_STEM_SIZE, resolve_stem
from skipline.specs import ModelSpec

_VGG_CONFIGURATIONS = {11: "A", 13: "B", 16: "D", 19: "E"}
"""Columns of table 1 of Simonyan & Zisserman (2015), by depth."""
_VGG_CHANNELS = 512
"""Channels of the last map of every VGG."""


def build_model(model: ModelSpec, num_classes: int, image_size: int) -> nn.Module:
    """A network with fresh weights: float [B, 3, image_size, image_size] -> [B, num_classes].

    Weights are drawn from torch's default generator: seed it first, or build under
    `torch.device("meta")` where weights will be loaded.
    """
    network: nn.Module
    if ARCHITECTURES[model.arch].family == "resnet":
        network = _resnet(model, num_classes, image_size)
    elif image_size <= MAX_SMALL_STEM_SIZE:
        network = _small_vgg(model, num_classes)
    else:
        network = get_model(
            model.arch, weights=None, num_classes=num_classes, dropout=model.dropout
        )
    return network


def _resnet(model: ModelSpec, num_classes: int, image_size: int) -> ResNet:
    """`small` keeps the input's resolution up to the first stage, as He et al. (2016, section
    4.2) do on CIFAR-10: a 3x3 convolution with stride 1 and no pooling."""
    network = get_model(model.arch, weights=None, num_classes=num_classes)
    if resolve_stem(model.stem, image_size) == "small":
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    if model.dropout:  # beside the pooling, so that the last layer keeps its name
        network.avgpool = nn.Sequential(network.avgpool, nn.Dropout(model.dropout))
    return network


def _small_vgg(model: ModelSpec, num_classes: int) -> VGG:
    """A VGG whose head is one layer on the averaged map: that of torchvision has 120 million
    parameters for maps of 7x7, which small images do not have."""
    facts = ARCHITECTURES[model.arch]
    features = make_layers(cfgs[_VGG_CONFIGURATIONS[facts.depth]], batch_norm=facts.batch_norm)
    with torch.device("meta"):  # the head that is replaced is never made
        network = VGG(features, init_weights=False)
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.classifier = nn.Sequential(
        nn.Dropout(model.dropout), nn.Linear(_VGG_CHANNELS, num_classes)
    )
    for layer in network.modules():  # as torchvision does
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.01)
            nn.init.zeros_(layer.bias)
    return network
