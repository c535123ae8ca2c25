from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from shared.vision.architectures import BasicBlock, Network, build_model
from skipline.catalog import ARCHITECTURES
from skipline.specs import ModelSpec

SMALL_ONES = ["resnet18", "resnet50_64px", "vgg11_bn", "vgg10_64px"]
"""One of each kind, quick to build at 32 px."""


def on_meta(arch: str, image_size: int, num_classes: int = 10, **options: object) -> Network:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build_model(ModelSpec(arch=arch, **options), num_classes, image_size)


def seeded(arch: str, seed: int = 0, image_size: int = 32, **options: object) -> Network:
    torch.manual_seed(seed)
    return build_model(ModelSpec(arch=arch, **options), 10, image_size)


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("image_size", [32, 64, 96])
def test_every_architecture_answers_with_a_score_a_class(arch: str, image_size: int) -> None:
    network = on_meta(arch, image_size, num_classes=7).eval()
    images = torch.empty(2, 3, image_size, image_size, device="meta")
    assert network(images).shape == (2, 7)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_takes_the_smallest_image_that_the_catalog_allows(arch: str) -> None:
    for stem, image_size in ARCHITECTURES[arch].min_image_size.items():
        network = on_meta(arch, image_size, stem=stem).eval()
        images = torch.empty(1, 3, image_size, image_size, device="meta")
        assert network(images).shape == (1, 10)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_parts_of_a_network_are_those_that_the_catalog_names(arch: str) -> None:
    names = [name.partition(".")[0] for name in on_meta(arch, 64).state_dict()]
    assert tuple(dict.fromkeys(names)) == ARCHITECTURES[arch].parts


@pytest.mark.parametrize(
    ("arch", "image_size", "expected"),
    [
        ("resnet18", 32, (512, 4, 4)),  # 32 until the first stage, then halved three times
        ("resnet50", 96, (2048, 3, 3)),
        ("vgg16", 64, (512, 2, 2)),  # halved five times
        ("vgg16_bn", 224, (512, 7, 7)),
        ("resnet50_64px", 64, (2048, 4, 4)),  # 64, 58, 56, then 28, 14, 7, 4
        ("vgg10_64px", 64, (512, 4, 4)),
    ],
)
def test_the_last_feature_map_comes_with_the_scores(
    arch: str, image_size: int, expected: tuple[int, ...]
) -> None:
    images = torch.empty(2, 3, image_size, image_size, device="meta")
    logits, features = on_meta(arch, image_size).eval().forward_with_features(images)
    assert logits.shape == (2, 10)
    assert features.shape == (2, *expected)


@pytest.mark.parametrize("arch", SMALL_ONES)
def test_the_scores_are_those_of_the_feature_map(arch: str) -> None:
    network, images = seeded(arch).eval(), torch.rand(2, 3, 32, 32)
    logits, features = network.forward_with_features(images)
    assert torch.equal(logits, network(images))
    assert torch.equal(logits, network.classify(features))
    assert not torch.equal(logits, network.classify(features + 1))


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "vgg11", "vgg16_bn"])
def test_at_full_size_the_networks_are_torchvisions(arch: str) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(arch, weights=None, num_classes=1000)
    assert shapes(on_meta(arch, 224, num_classes=1000)) == shapes(theirs)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("is_training", [True, False])
def test_a_resnet_computes_what_torchvisions_does(arch: str, is_training: bool) -> None:
    ours = seeded(arch, stem="imagenet").train(is_training)
    theirs = torchvision.models.get_model(arch, weights=None, num_classes=10).train(is_training)
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(4, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


def test_a_small_vgg_keeps_the_names_of_its_weights() -> None:
    """Stored checkpoints have them."""
    with torch.device("meta"):
        theirs = torchvision.models.vgg13_bn(weights=None)
    features = [name for name in theirs.state_dict() if name.startswith("features.")]
    names = [*features, "classifier.1.weight", "classifier.1.bias"]
    assert list(on_meta("vgg13_bn", 32).state_dict()) == names


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
        # ResNet-50 without its head and the last block (512 * (2048 + 9 * 512 + 2048) weights and
        # three norms), with a bias in the stem and layers of 2048, 2048, 1000 and 10.
        (
            "resnet50_64px",
            64,
            (25_557_032 - 1000 * 2049)
            - (512 * (2048 + 9 * 512 + 2048) + 2 * (512 + 512 + 2048))
            + 64
            + (2049 * 2048 + 2049 * 1000 + 1001 * 10),
        ),
        # Ten 3x3 convolutions with bias, then layers of 512, 1028, 1028, 512 and 10.
        (
            "vgg10_64px",
            64,
            (28 * 64 + 577 * 64 + 577 * 128 + 1153 * 128)
            + (1153 * 256 + 2 * 2305 * 256 + 2305 * 512 + 2 * 4609 * 512)
            + (513 * 1028 + 1029 * 1028 + 1029 * 512 + 513 * 10),
        ),
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


def test_every_stage_of_the_published_resnet_begins_with_a_block_of_stride_2() -> None:
    network = on_meta("resnet50_64px", 64)
    stages = [network.layer1, network.layer2, network.layer3, network.layer4]
    assert [len(stage) for stage in stages] == [3, 4, 6, 2]
    for stage in stages:
        convolution, norm = stage[0].downsample
        assert (convolution.kernel_size, convolution.stride) == ((1, 1), (2, 2))
        assert isinstance(norm, nn.BatchNorm2d)
        assert [block.conv2.stride for block in stage] == [(2, 2)] + [(1, 1)] * (len(stage) - 1)
        assert all(block.downsample is None for block in stage[1:])


def test_the_published_resnets_stem_leaves_56_of_64_pixels() -> None:
    network = on_meta("resnet50_64px", 64)
    stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
    assert stem(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 64, 56, 56)


def test_the_published_resnets_head_is_linear() -> None:
    head = on_meta("resnet50_64px", 64).fc
    assert [type(layer) for layer in head] == [nn.Linear] * 3
    assert [layer.out_features for layer in head] == [2048, 1000, 10]


def test_the_published_vgg_drops_after_each_of_its_four_groups() -> None:
    kinds = {nn.Conv2d: "C", nn.ReLU: "R", nn.MaxPool2d: "M", nn.Dropout: "D"}
    features = on_meta("vgg10_64px", 64, dropout=0.4).features
    order = "".join(kinds[type(layer)] for layer in features)
    assert order == "CRCRMD" * 2 + "CRCRCRMD" * 2
    assert {layer.p for layer in features if isinstance(layer, nn.Dropout)} == {0.4}


@pytest.mark.parametrize("arch", SMALL_ONES)
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


@pytest.mark.parametrize("arch", SMALL_ONES)
def test_without_dropout_training_draws_no_random_numbers(arch: str) -> None:
    network, images = seeded(arch).train(), torch.rand(2, 3, 32, 32)
    state = torch.get_rng_state()
    network(images)
    assert torch.equal(torch.get_rng_state(), state)


def test_drop_rates_rise_linearly_to_the_last_block() -> None:
    network = on_meta("resnet18", 32, stochastic_depth=0.4)
    rates = [module.drop_rate for module in network.modules() if isinstance(module, BasicBlock)]
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4])


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet50_64px"])
def test_stochastic_depth_leaves_the_names(arch: str) -> None:
    dropping = on_meta(arch, 64, stochastic_depth=0.5)
    assert dropping.state_dict().keys() == on_meta(arch, 64).state_dict().keys()


def test_a_branch_is_dropped_or_scaled_up_image_by_image() -> None:
    torch.manual_seed(0)
    block, images = BasicBlock(4, 4), torch.randn(32, 4, 3, 3)
    block.drop_rate = 0.75
    branch = block.branch(images)
    dropped, kept = torch.relu(images), torch.relu(images + branch / (1 - 0.75))
    num_dropped = 0
    for index, image in enumerate(block(images)):
        is_dropped = torch.allclose(image, dropped[index])
        assert is_dropped or torch.allclose(image, kept[index])
        num_dropped += is_dropped
    assert 16 < num_dropped < 32


def test_no_branch_is_dropped_in_eval_mode() -> None:
    network, images = seeded("resnet18").eval(), torch.rand(2, 3, 32, 32)
    dropping = seeded("resnet18", stochastic_depth=0.9).eval()
    assert torch.equal(network(images), dropping(images))


@pytest.mark.parametrize("init", ["kaiming", "torch"])
@pytest.mark.parametrize("arch", SMALL_ONES)
def test_a_seed_gives_the_same_weights(arch: str, init: str) -> None:
    first, again, other = (seeded(arch, seed, init=init).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_only_layers_that_are_initialised_hold_weights(arch: str) -> None:
    for layer in on_meta(arch, 64).modules():
        if [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]:
            assert type(layer) in (nn.Conv2d, nn.Linear, nn.BatchNorm2d)


@pytest.mark.parametrize("arch", SMALL_ONES)
def test_kaiming_draws_by_fan_out_and_sets_biases_to_zero(arch: str) -> None:
    for layer in seeded(arch).modules():
        if isinstance(layer, nn.Conv2d):
            std = (2 / (layer.out_channels * layer.kernel_size[0] ** 2)) ** 0.5
            assert layer.weight.std().item() == pytest.approx(std, rel=0.1)
        elif isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.1)
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            assert not layer.bias.any()


@pytest.mark.parametrize("arch", SMALL_ONES)
def test_init_torch_keeps_torchs_own_draws(arch: str) -> None:
    """Uniform within one over the square root of a unit's inputs, biases too."""
    for layer in seeded(arch, init="torch").modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = layer.weight[0].numel() ** -0.5
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert layer.weight.abs().max() <= bound
            if layer.bias is not None:
                assert 0 < layer.bias.abs().max() <= bound


def test_init_torch_draws_the_numbers_that_the_layer_draws_when_made() -> None:
    torch.manual_seed(3)
    convolution = nn.Conv2d(3, 64, kernel_size=3, padding=1)
    network = seeded("vgg10_64px", seed=3, init="torch")
    assert torch.equal(network.features[0].weight, convolution.weight)
    assert torch.equal(network.features[0].bias, convolution.bias)


@pytest.mark.parametrize("init", ["kaiming", "torch"])
def test_fresh_norms_are_the_identity(init: str) -> None:
    norms = [m for m in seeded("resnet18", init=init).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 20
    for norm in norms:
        assert (norm.weight == 1).all()
        assert (norm.running_var == 1).all()
        assert not norm.bias.any()
        assert not norm.running_mean.any()
        assert norm.num_batches_tracked == 0


def test_fresh_weights_keep_the_scale_of_activations() -> None:
    torch.manual_seed(0)
    network = build_model(ModelSpec(arch="vgg11_bn"), 10, 32).eval()
    first = network.features[0].weight  # kaiming: variance 2 / (64 channels * 9)
    assert first.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)
    assert network(torch.rand(2, 3, 32, 32)).isfinite().all()
