from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models import get_model_weights

from shared.errors import TrainingError
from shared.vision.architectures import Network, build_model
from shared.vision.bundle import Weights
from shared.vision.transfer import freeze, imagenet_weights, start_from
from skipline.catalog import ARCHITECTURES
from skipline.specs import ModelSpec


def network(seed: int, num_classes: int = 10, arch: str = "resnet18") -> Network:
    torch.manual_seed(seed)
    return build_model(ModelSpec(arch=arch), num_classes, 32)


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed_names(model: nn.Module, before: Weights) -> list[str]:
    return [n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])]


def test_weights_of_the_same_network_are_taken_whole() -> None:
    model, weights = network(1), copy_of(network(2))
    assert start_from(model, weights, "fc") == []
    assert changed_names(model, weights) == []


def test_the_head_for_another_number_of_classes_stays_fresh() -> None:
    model, weights = network(1, num_classes=3), copy_of(network(2, num_classes=10))
    fresh = copy_of(model)
    assert start_from(model, weights, "fc") == ["fc.weight", "fc.bias"]
    for name, tensor in model.state_dict().items():
        expected = fresh if name.startswith("fc.") else weights
        assert torch.equal(tensor, expected[name])


def test_of_a_head_of_many_layers_only_the_last_stays_fresh() -> None:
    model = network(1, num_classes=3, arch="vgg10_64px")
    weights = copy_of(network(2, num_classes=10, arch="vgg10_64px"))
    fresh = start_from(model, weights, "classifier")
    assert fresh == ["classifier.6.weight", "classifier.6.bias"]
    assert torch.equal(model.classifier[4].weight, weights["classifier.4.weight"])


def test_a_head_of_other_layers_stays_fresh_as_a_whole() -> None:
    """As a VGG's for small images does beside ImageNet's weights."""
    model = network(1, arch="vgg11")
    features = {n: t for n, t in copy_of(network(2, arch="vgg11")).items() if "features" in n}
    theirs = {f"classifier.{place}.weight": torch.zeros(2, 2) for place in (0, 3, 6)}
    fresh = start_from(model, features | theirs, "classifier")
    assert fresh == ["classifier.1.weight", "classifier.1.bias"]
    assert torch.equal(model.features[0].weight, features["features.0.weight"])


def rename(weights: dict[str, torch.Tensor]) -> None:
    weights["stem.weight"] = weights.pop("conv1.weight")


def reshape(weights: dict[str, torch.Tensor]) -> None:
    weights["bn1.weight"] = torch.ones(3)


def lose_the_bias(weights: dict[str, torch.Tensor]) -> None:
    del weights["fc.bias"]


def lose_the_bias_of_other_classes(weights: dict[str, torch.Tensor]) -> None:
    weights["fc.weight"] = torch.zeros(3, 512)
    del weights["fc.bias"]


def add_a_layer(weights: dict[str, torch.Tensor]) -> None:
    weights["fc.1.weight"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (rename, ["conv1.weight is missing", "stem.weight is not of this network"]),
        (reshape, ["bn1.weight has the shape [3] instead of [64]"]),
        (lose_the_bias, ["fc.bias is missing"]),
        (lose_the_bias_of_other_classes, ["fc.bias is missing"]),
        (add_a_layer, ["fc.1.weight is not of this network"]),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    spoil: Callable[[dict[str, torch.Tensor]], None], told: list[str]
) -> None:
    model, weights = network(1), copy_of(network(2))
    spoil(weights)
    before = copy_of(model)
    with pytest.raises(TrainingError) as caught:
        start_from(model, weights, "fc")
    assert caught.value.code == "weights_do_not_fit"
    assert caught.value.message.endswith("of another network: " + "; ".join(told))
    assert "model.arch" in caught.value.hint
    assert changed_names(model, before) == []


def test_a_layer_within_the_head_may_not_differ() -> None:
    model, weights = network(1, arch="vgg10_64px"), copy_of(network(2, arch="vgg10_64px"))
    weights["classifier.4.bias"] = torch.zeros(3)
    with pytest.raises(TrainingError, match=r"classifier\.4\.bias has the shape \[3\]"):
        start_from(model, weights, "classifier")


def test_of_many_misfits_some_are_named_and_the_rest_counted() -> None:
    model, weights = network(1), copy_of(network(2))
    # Of 122 tensors the two of the head stay fresh: 120 are missing, and 122 are of another.
    others = {f"other.{name}": tensor for name, tensor in weights.items()}
    with pytest.raises(TrainingError, match=r"; and 239 more$"):
        start_from(model, others, "fc")


def offer(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Lets torchvision offer the file behind `url` as weights of every network."""
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(url=url))
    monkeypatch.setattr("shared.vision.transfer.get_model_weights", lambda arch: weights)


def store(folder: Path, weights: Weights) -> Path:
    """Writes the file as torchvision names it, by the start of its hash."""
    buffer = BytesIO()
    torch.save(weights, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    path = folder / f"tiny-{digest[:8]}.pth"
    path.write_bytes(buffer.getvalue())
    return path


def test_imagenet_weights_are_downloaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store(tmp_path, {"fc.weight": torch.arange(3.0)})
    offer(monkeypatch, path.as_uri())
    folder = tmp_path / "cache" / "downloads"
    first = imagenet_weights("resnet18", folder)
    assert [file.name for file in folder.iterdir()] == [path.name]
    path.unlink()
    again = imagenet_weights("resnet18", folder)
    assert first["fc.weight"].tolist() == again["fc.weight"].tolist() == [0, 1, 2]


def test_weights_older_than_the_counters_of_batch_norms_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = copy_of(network(2))
    old = {name: t for name, t in stored.items() if not name.endswith("num_batches_tracked")}
    offer(monkeypatch, store(tmp_path, old).as_uri())
    model = network(1)
    assert start_from(model, imagenet_weights("resnet18", tmp_path / "new"), "fc") == []
    assert changed_names(model, stored) == []


@pytest.mark.parametrize("case", ["nothing there", "other bytes"])
def test_a_failed_download_says_where_to_put_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    path = tmp_path / "tiny-01234567.pth"
    if case == "other bytes":
        path.write_bytes(b"not what the name says")
    offer(monkeypatch, path.as_uri())
    timeout = socket.getdefaulttimeout()
    with pytest.raises(TrainingError) as caught:
        imagenet_weights("resnet18", tmp_path / "downloads")
    assert caught.value.code == "download_failed"
    assert path.name in caught.value.message
    assert "the folder downloads of the worker's cache" in caught.value.hint
    assert not list((tmp_path / "downloads").iterdir())
    assert socket.getdefaulttimeout() == timeout


def test_a_damaged_file_of_weights_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store(tmp_path, {"fc.weight": torch.arange(3.0)})
    offer(monkeypatch, path.as_uri())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TrainingError) as caught:
        imagenet_weights("resnet18", tmp_path)
    assert caught.value.code == "weights_damaged"
    assert path.name in caught.value.message


@pytest.mark.parametrize("arch", [a for a, f in ARCHITECTURES.items() if f.has_imagenet_weights])
def test_torchvision_names_the_hash_of_every_network_that_the_catalog_promises(arch: str) -> None:
    name = get_model_weights(arch).DEFAULT.url.rpartition("/")[2]
    prefix = name.removesuffix(".pth").rpartition("-")[2]
    assert len(prefix) >= 8
    assert set(prefix) <= set("0123456789abcdef")


def test_frozen_parts_take_no_gradients_and_keep_their_statistics() -> None:
    model = network(1)
    freeze(model, ("conv1", "bn1", "layer1"))
    model.train()
    before = copy_of(model)
    model(torch.rand(4, 3, 32, 32)).sum().backward()
    frozen = ("conv1.", "bn1.", "layer1.")
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen)
    changed = changed_names(model, before)
    assert "layer2.0.bn1.running_mean" in changed
    assert not [name for name in changed if name.startswith(frozen)]


def test_frozen_parts_stay_in_eval_mode_whoever_switches() -> None:
    model = network(1).train()
    freeze(model, ("layer1",))
    outer = nn.Sequential(model)  # as wrappers for several processes do
    for mode in (True, False, True):
        outer.train(mode)
        assert not any(module.training for module in model.layer1.modules())
        assert model.layer2.training is model.training is mode


def test_freezing_acts_at_once() -> None:
    model = network(1).train()
    freeze(model, ("layer1",))
    assert not model.layer1.training
    assert model.training
