from __future__ import annotations

import pytest
import torch
from torch import nn

from shared.vision.architectures import build_model
from shared.vision.summary import summarize
from skipline.catalog import ARCHITECTURES
from skipline.schemas import LayerSummary, Summary
from skipline.specs import ModelSpec


def summary_of(arch: str, image_size: int, num_classes: int) -> Summary:
    with torch.device("meta"):
        model = build_model(ModelSpec(arch=arch), num_classes, image_size)
    return summarize(model, image_size)


def small_network(dropout: float = 0.0) -> nn.Sequential:
    """For images of 6 pixels."""
    return nn.Sequential(
        nn.Conv2d(3, 4, kernel_size=3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, kernel_size=3, groups=2, bias=False),
        nn.Dropout(dropout),
        nn.AvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


@pytest.mark.parametrize(
    ("arch", "image_size", "num_classes", "num_parameters", "giga_multiply_adds"),
    [
        # As torchvision states them for its weights.
        ("resnet18", 224, 1000, 11_689_512, 1.814),
        ("resnet50", 224, 1000, 25_557_032, 4.089),
        ("resnet152", 224, 1000, 60_192_808, 11.514),
        ("vgg16", 224, 1000, 138_357_544, 15.470),
        ("vgg19_bn", 224, 1000, 143_678_248, 19.632),
        # The stem, four convolutions of the first stage, and three stages of one at stride 2,
        # three more and a shortcut; 32x32 pixels at first, then a quarter each time.
        (
            "resnet18",
            32,
            10,
            11_173_962,
            (
                27 * 64 * 32**2
                + 4 * 9 * 64**2 * 32**2
                + 3 * (9 * 64 * 128 + 3 * 9 * 128**2 + 64 * 128) * 16**2
                + 512 * 10
            )
            / 1e9,
        ),
    ],
)
def test_totals_are_those_that_are_known(
    arch: str, image_size: int, num_classes: int, num_parameters: int, giga_multiply_adds: float
) -> None:
    summary = summary_of(arch, image_size, num_classes)
    assert summary.num_parameters == summary.num_trainable_parameters == num_parameters
    assert summary.multiply_adds / 1e9 == pytest.approx(giga_multiply_adds, abs=5e-4)


def test_layers_come_in_order_with_the_shapes_of_one_image() -> None:
    assert summarize(small_network(), 6).layers == [
        LayerSummary(name="0", type="Conv2d", output_shape=[4, 6, 6], num_parameters=112),
        LayerSummary(name="1", type="BatchNorm2d", output_shape=[4, 6, 6], num_parameters=8),
        LayerSummary(name="2", type="ReLU", output_shape=[4, 6, 6], num_parameters=0),
        LayerSummary(name="3", type="MaxPool2d", output_shape=[4, 3, 3], num_parameters=0),
        LayerSummary(name="4", type="Conv2d", output_shape=[8, 1, 1], num_parameters=144),
        LayerSummary(name="5", type="Dropout", output_shape=[8, 1, 1], num_parameters=0),
        LayerSummary(name="6", type="AvgPool2d", output_shape=[8, 1, 1], num_parameters=0),
        LayerSummary(name="7", type="Flatten", output_shape=[8], num_parameters=0),
        LayerSummary(name="8", type="Linear", output_shape=[5], num_parameters=45),
    ]


def test_multiply_adds_are_of_convolutions_and_linear_layers() -> None:
    expected = 4 * 6 * 6 * (3 * 9) + 8 * (2 * 9) + 5 * 8  # the second convolution has two groups
    assert summarize(small_network(), 6).multiply_adds == expected


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_works_in_place_takes_no_memory(dropout: float) -> None:
    # Convolution and norm, but not the ReLU; pool, convolution, dropout if there is any, pool, and
    # the last layer, but not flattening.
    num_values = 2 * 4 * 6 * 6 + 4 * 3 * 3 + 8 + (8 if dropout else 0) + 8 + 5
    assert summarize(small_network(dropout), 6).forward_bytes == 4 * num_values


def test_a_layer_that_is_passed_twice_is_there_twice() -> None:
    relu = nn.ReLU()
    summary = summarize(nn.Sequential(nn.Conv2d(3, 2, 1), relu, nn.Conv2d(2, 2, 1), relu), 4)
    assert [layer.name for layer in summary.layers] == ["0", "1", "2", "1"]
    assert summary.forward_bytes == 4 * 4 * (2 * 4 * 4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_parameters_of_the_layers_are_all_there_are(arch: str) -> None:
    summary = summary_of(arch, 64, 10)
    assert sum(layer.num_parameters for layer in summary.layers) == summary.num_parameters
    assert summary.layers[0].output_shape[0] == 64
    assert summary.layers[-1].output_shape == [10]


def test_frozen_parameters_are_not_trainable() -> None:
    network = small_network()
    network[0].requires_grad_(False)
    summary = summarize(network, 6)
    assert (summary.num_parameters, summary.num_trainable_parameters) == (309, 309 - 112)


def test_a_summary_leaves_the_network_as_it_was() -> None:
    network = small_network(dropout=0.5).train()
    network[1].eval()
    modes = [module.training for module in network.modules()]
    tensors = list(network.state_dict(keep_vars=True).values())
    values = [tensor.clone() for tensor in tensors]
    random_state = torch.get_rng_state()
    summarize(network, 6)
    assert [module.training for module in network.modules()] == modes
    after = list(network.state_dict(keep_vars=True).values())
    assert all(tensor is before for tensor, before in zip(after, tensors, strict=True))
    assert all(torch.equal(tensor, value) for tensor, value in zip(after, values, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks for module in network.modules())


def test_a_network_that_fails_is_left_as_it_was_too() -> None:
    network = small_network().eval()
    with pytest.raises(RuntimeError, match="size"):
        summarize(network, 3)  # leaves one pixel for a convolution of three
    assert not any(module.training for module in network.modules())
    assert not any(module._forward_hooks for module in network.modules())
