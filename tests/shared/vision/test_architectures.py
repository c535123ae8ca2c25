from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from shared.vision.architectures import build_model
from skipline.catalog import ARCHITECTURES
from skipline.specs import ModelSpec


def on_meta(arch: str, image_size: int, num_classes: int = 10, **options: object) -> nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build_model(ModelSpec(arch=arch, **options), num_classes, image_size)


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("image_size", [32, 64, 96])
def test_every_architecture_answers_with_a_score_a_class(arch: str, image_size: int) -> None:
    network = on_meta(arch, image_size, num_classes=7).eval()
    images = torch.empty(2, 3, image_size, image_size, device="meta")
    assert network(images).shape == (2, 7)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "vgg11", "vgg16_bn"])
def test_at_full_size_the_networks_are_torchvisions(arch: str) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(arch, weights=None, num_classes=1000)
    ours = on_meta(arch, 224, num_classes=1000)
    assert {n: w.shape for n, w in ours.state_dict().items()} == {
        n: w.shape for n, w in theirs.state_dict().items()
    }


@pytest.mark.parametrize(
    ("arch", "image_size", "expected"),
    [
        # torchvision's count for 1000 classes: minus 990 * 513 of the last layer, and the stem's
        # 64 * 3 * (49 - 9) weights for the small one.
        ("resnet18", 224, 11_689_512 - 990 * 513),
        ("resnet18", 32, 11_689_512 - 990 * 513 - 7_680),
        ("resnet50", 32, 25_557_032 - 990 * 2049 - 7_680),
        # 3x3 convolutions with bias: VGG-11's eight, then one layer of 512 to 10.
        ("vgg11", 32, 9_220_480 + 5_130),
    ],
)
def test_parameters_are_as_many_as_counted_by_hand(
    arch: str, image_size: int, expected: int
) -> None:
    assert num_parameters(on_meta(arch, image_size)) == expected


def test_the_small_stem_keeps_the_resolution() -> None:
    network = on_meta("resnet18", 32)
    stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
    assert stem(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 64, 32, 32)


def test_a_named_stem_overrules_the_image_size() -> None:
    assert on_meta("resnet18", 32, stem="imagenet").conv1.kernel_size == (7, 7)
    assert on_meta("resnet18", 96, stem="small").conv1.kernel_size == (3, 3)


@pytest.mark.parametrize("arch", ["resnet18", "vgg11_bn"])
@pytest.mark.parametrize("image_size", [32, 96])
def test_dropout_acts_in_training_only_and_leaves_the_names(arch: str, image_size: int) -> None:
    plain, dropping = on_meta(arch, image_size), on_meta(arch, image_size, dropout=0.5)
    assert plain.state_dict().keys() == dropping.state_dict().keys()
    rates = [layer.p for layer in dropping.modules() if isinstance(layer, nn.Dropout)]
    assert rates
    assert set(rates) == {0.5}


def test_dropout_of_a_resnet_comes_right_before_the_last_layer() -> None:
    torch.manual_seed(0)
    network = build_model(ModelSpec(dropout=0.5), 10, 8).train()
    features: list[torch.Tensor] = []
    network.fc.register_forward_hook(lambda layer, inputs, output: features.append(inputs[0]))
    network(torch.rand(4, 3, 8, 8))
    assert 0.3 < (features[0] == 0).float().mean() < 0.7


@pytest.mark.parametrize("arch", ["resnet18", "vgg11_bn"])
def test_a_seed_gives_the_same_weights(arch: str) -> None:
    def build(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build_model(ModelSpec(arch=arch), 10, 32).state_dict()

    first, again, other = build(1), build(1), build(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_fresh_weights_keep_the_scale_of_activations() -> None:
    torch.manual_seed(0)
    network = build_model(ModelSpec(arch="vgg11_bn"), 10, 32).eval()
    first = network.features[0].weight  # kaiming: variance 2 / (64 channels * 9)
    assert first.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)
    assert network(torch.rand(2, 3, 32, 32)).isfinite().all()
