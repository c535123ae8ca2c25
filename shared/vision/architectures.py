"""Networks from a spec: torchvision's ResNets and VGGs, with a stem or head for small images, and
two published networks for 64 px.

Knows nothing of stored weights. Keys of the state dict are torchvision's, except for the one-layer
head of a VGG for small images and for what the published networks have of their own. Importing
torchvision costs about a second of a bare process, most of it torch's compiler, which `torch.optim`
imports anyway.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
import torchvision
from torch import nn
from torchvision.models.vgg import cfgs, make_layers
from torchvision.ops import stochastic_depth

from skipline.catalog import ARCHITECTURES, MAX_SMALL_STEM_SIZE, resolve_stem
from skipline.specs import ModelSpec

_NUM_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Blocks of each stage, by depth: table 1 of He et al. (2016)."""
_VGG_CONFIGURATIONS = {11: "A", 13: "B", 16: "D", 19: "E"}
"""Columns of table 1 of Simonyan & Zisserman (2015), by depth."""
_VGG_CHANNELS = 512
"""Channels of the last map of every VGG."""


class Network(nn.Module, ABC):
    """A classifier: float [B, 3, H, W] -> logits [B, C].

    Its last feature map is a ResNet's after the last stage, and a VGG's after the last group of
    convolutions with its pool.
    """

    frozen_parts: tuple[str, ...] = ()
    """Modules that stay in eval mode, so that their norms keep their statistics;
    `shared.vision.transfer.freeze` names them."""

    @abstractmethod
    def feature_map(self, images: torch.Tensor) -> torch.Tensor:
        """float [B, 3, H, W] -> the last feature map, float [B, K, h, w]."""

    @abstractmethod
    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """The last feature map, float [B, K, h, w] -> logits [B, C]."""

    def forward_with_features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float [B, 3, H, W] -> logits [B, C] and the last feature map, float [B, K, h, w]."""
        features = self.feature_map(images)
        return self.classify(features), features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_with_features(images)[0]

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        for part in self.frozen_parts:
            self.get_submodule(part).eval()
        return self


def build_model(model: ModelSpec, num_classes: int, image_size: int) -> Network:
    """A network with fresh weights: float [B, 3, image_size, image_size] -> [B, num_classes].

    Weights are drawn from torch's default generator: seed it first, or build under
    `torch.device("meta")` where weights will be loaded.
    """
    facts = ARCHITECTURES[model.arch]
    with torch.device("meta"):  # what the constructors draw is drawn anew: draw once
        network: Network
        if model.arch == "resnet50_64px":
            network = ResNet64px(num_classes, model.dropout)
        elif model.arch == "vgg10_64px":
            network = VGG64px(num_classes, model.dropout)
        elif facts.family == "resnet":
            stem = resolve_stem(model.stem, image_size)
            network = ResNet(facts.depth, stem, num_classes, model.dropout)
        elif image_size <= MAX_SMALL_STEM_SIZE:
            network = SmallVGG(facts.depth, facts.batch_norm, num_classes, model.dropout)
        else:
            network = VGG(facts.depth, facts.batch_norm, num_classes, model.dropout)
    _set_drop_rates(network, model.stochastic_depth)
    network.to_empty(device=torch.get_default_device())
    _initialize(network, model.init)
    return network


def _initialize(network: Network, init: Literal["kaiming", "torch"]) -> None:
    """Draws every weight, in the order of the modules.

    `kaiming`: He et al. (2015) for convolutions, by fan-out; normal(0, 0.01) for linear layers;
    biases 0. `torch`: as each layer draws its own. Norms start as the identity.
    """
    for layer in network.modules():
        if init == "kaiming" and isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif init == "kaiming" and isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.01)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            layer.reset_parameters()


# ResNets


class _Block(nn.Module, ABC):
    """A residual block: ReLU(branch(x) + shortcut(x)). In training the branch of each image is
    dropped with probability `drop_rate`, and scaled up otherwise (Huang et al., 2016)."""

    conv1: nn.Module
    bn1: nn.Module
    conv2: nn.Module
    bn2: nn.Module
    relu: nn.Module
    downsample: nn.Module | None
    drop_rate = 0.0

    @abstractmethod
    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the shortcut, before the ReLU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.branch(x)
        if self.training and self.drop_rate:
            out = stochastic_depth(out, self.drop_rate, mode="row")
        out += x if self.downsample is None else self.downsample(x)
        activated: torch.Tensor = self.relu(out)
        return activated


class BasicBlock(_Block, torchvision.models.resnet.BasicBlock):  # type: ignore[misc]
    """Two 3x3 convolutions."""

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        out: torch.Tensor = self.bn2(self.conv2(x))
        return out


class Bottleneck(_Block, torchvision.models.resnet.Bottleneck):  # type: ignore[misc]
    """1x1, 3x3 and 1x1 convolutions; the stride is in the second."""

    conv3: nn.Module
    bn3: nn.Module

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        out: torch.Tensor = self.bn3(self.conv3(x))
        return out


def _set_drop_rates(network: Network, last_rate: float) -> None:
    """Block l of L drops with the rate l / L * `last_rate`."""
    blocks = [module for module in network.modules() if isinstance(module, _Block)]
    for number, block in enumerate(blocks, start=1):
        block.drop_rate = last_rate * number / len(blocks)


class ResNet(Network, torchvision.models.ResNet):  # type: ignore[misc]
    """He et al. (2016). The stem `small` keeps the input's resolution up to the first stage, as
    they do on CIFAR-10 (section 4.2): a 3x3 convolution with stride 1 and no pooling."""

    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module
    avgpool: nn.Module
    fc: nn.Module

    def __init__(
        self, depth: int, stem: Literal["small", "imagenet"], num_classes: int, dropout: float
    ) -> None:
        block = BasicBlock if depth < 50 else Bottleneck
        super().__init__(block, list(_NUM_BLOCKS[depth]), num_classes=num_classes)
        if stem == "small":
            self.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.avgpool = _average_pool(dropout)

    def feature_map(self, images: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features: torch.Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return features

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(torch.flatten(self.avgpool(features), 1))
        return logits


class ResNet64px(ResNet):
    """A published network for TinyImageNet, after ResNet-50: a stem that leaves 56x56 of 64x64,
    stages of 3, 4, 6 and 2 blocks which all halve the map, three linear layers in a row.

    Where it departs from ResNet-50 by mistake, this one does not: its stem has a norm and a ReLU,
    its blocks have weights of their own and add before the last ReLU.
    """

    def __init__(self, num_classes: int, dropout: float) -> None:
        super(ResNet, self).__init__(Bottleneck, [3, 4, 6, 2])
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=1)
        self.inplanes = 64
        self.layer1 = self._make_layer(Bottleneck, 64, 3, stride=2)  # type: ignore[operator]
        self.avgpool = _average_pool(dropout)
        self.fc = nn.Sequential(
            nn.Linear(2048, 2048), nn.Linear(2048, 1000), nn.Linear(1000, num_classes)
        )


def _average_pool(dropout: float) -> nn.Module:
    """Dropout stands beside the pooling, so that the head keeps its name."""
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(pool, nn.Dropout(dropout)) if dropout else pool


# VGGs


class VGG(Network, torchvision.models.VGG):  # type: ignore[misc]
    """Simonyan & Zisserman (2015)."""

    features: nn.Module
    avgpool: nn.Module
    classifier: nn.Module

    def __init__(self, depth: int, batch_norm: bool, num_classes: int, dropout: float) -> None:
        features = make_layers(cfgs[_VGG_CONFIGURATIONS[depth]], batch_norm=batch_norm)
        super().__init__(features, num_classes, init_weights=False, dropout=dropout)

    def feature_map(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.features(images)
        return features

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(torch.flatten(self.avgpool(features), 1))
        return logits


class SmallVGG(VGG):
    """A VGG whose head is one layer on the averaged map: that of torchvision has 120 million
    parameters for maps of 7x7, which small images do not have."""

    def __init__(self, depth: int, batch_norm: bool, num_classes: int, dropout: float) -> None:
        super().__init__(depth, batch_norm, num_classes, dropout)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(_VGG_CHANNELS, num_classes))


class VGG64px(VGG):
    """A published network for TinyImageNet: ten convolutions in four groups, each followed by a
    pool and dropout, and four linear layers. Its pool over the whole map is adaptive here."""

    def __init__(self, num_classes: int, dropout: float) -> None:
        groups = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512))
        super(VGG, self).__init__(_groups_with_dropout(groups, dropout), init_weights=False)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(_VGG_CHANNELS, 1028),
            nn.ReLU(inplace=True),
            nn.Linear(1028, 1028),
            nn.ReLU(inplace=True),
            nn.Linear(1028, 512),
            nn.ReLU(inplace=True),
            nn.Linear(512, num_classes),
        )


def _groups_with_dropout(groups: Sequence[Sequence[int]], dropout: float) -> nn.Sequential:
    """3x3 convolutions with as many channels as `groups` says, each with a ReLU; after each group a
    2x2 max pool and dropout."""
    layers: list[nn.Module] = []
    num_inputs = 3
    for group in groups:
        for num_outputs in group:
            layers += [nn.Conv2d(num_inputs, num_outputs, kernel_size=3, padding=1)]
            layers += [nn.ReLU(inplace=True)]
            num_inputs = num_outputs
        layers += [nn.MaxPool2d(kernel_size=2), nn.Dropout(dropout)]
    return nn.Sequential(*layers)
