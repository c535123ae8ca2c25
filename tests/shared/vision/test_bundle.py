from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from shared.bundle_files import BUNDLE_FILE, WEIGHTS_FILE
from shared.errors import CheckpointCorrupt
from shared.vision.architectures import build_model
from shared.vision.bundle import (
    Bundle,
    BundleDataset,
    read_bundle,
    restore_model,
    write_bundle,
)
from shared.vision.predictor import Predictor
from shared.vision.preprocessing import Normalizer, Preprocessing
from skipline.specs import ModelSpec, TrainSpec

CPU = torch.device("cpu")


def make_bundle(**spec: object) -> Bundle:
    return Bundle(
        spec=TrainSpec(dataset="tiny", image_size=8, **spec),
        classes=("cat", "dog", "Ångström"),
        preprocessing=Preprocessing(
            image_size=8, channel_mean=(0.4, 0.5, 0.6), channel_std=(0.2, 0.25, 0.3)
        ),
        dataset=BundleDataset(name="tiny", id="ds-1", hash="abc"),
        epoch=2,
        step=10,
        metrics={"val_loss": 0.25, "val_top1": 0.875},
    )


def make_model(channels_last: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(ModelSpec(), 3, 8)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    model(torch.rand(4, 3, 8, 8))  # so that batch norm has statistics to carry
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model()


def test_what_is_written_is_read(tmp_path: Path, model: nn.Module) -> None:
    written = write_bundle(tmp_path, make_bundle(), model.state_dict())
    bundle, weights = read_bundle(tmp_path)
    assert bundle == written
    expected = model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_folder_holds_weights_and_readable_json(tmp_path: Path, model: nn.Module) -> None:
    write_bundle(tmp_path, make_bundle(), model.state_dict())
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS_FILE, BUNDLE_FILE}
    text = (tmp_path / BUNDLE_FILE).read_text(encoding="utf-8")
    document = json.loads(text)
    assert document["format_version"] == 1
    assert document["classes"] == ["cat", "dog", "Ångström"]
    assert "Ångström" in text
    assert document["spec"]["optimizer"]["lr"] == 0.1
    assert {"python", "torch", "torchvision", "numpy", "pillow"} == document["versions"].keys()
    assert '\n  "step": 10,\n' in text


@pytest.mark.parametrize("place", [0, 9, 4000, -1])
def test_a_flipped_byte_in_the_weights_is_noticed(
    tmp_path: Path, model: nn.Module, place: int
) -> None:
    write_bundle(tmp_path, make_bundle(), model.state_dict())
    damaged = bytearray((tmp_path / WEIGHTS_FILE).read_bytes())
    damaged[place] ^= 1
    (tmp_path / WEIGHTS_FILE).write_bytes(damaged)
    with pytest.raises(CheckpointCorrupt):
        read_bundle(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, BUNDLE_FILE])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
def test_a_missing_or_short_file_is_noticed(
    tmp_path: Path, model: nn.Module, name: str, damage: str
) -> None:
    write_bundle(tmp_path, make_bundle(), model.state_dict())
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:-100])
    with pytest.raises(CheckpointCorrupt) as caught:
        read_bundle(tmp_path)
    assert str(tmp_path) not in str(caught.value)


def test_weights_of_another_network_are_refused(model: nn.Module) -> None:
    with pytest.raises(CheckpointCorrupt):
        restore_model(make_bundle(model=ModelSpec(arch="resnet34")), model.state_dict(), CPU)


def test_a_restored_model_computes_the_same(tmp_path: Path, model: nn.Module) -> None:
    write_bundle(tmp_path, make_bundle(), model.state_dict())
    restored = restore_model(*read_bundle(tmp_path), CPU)
    images = torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert torch.equal(restored(images), model(images))


@pytest.mark.parametrize("channels_last", [True, False])
def test_predictions_are_the_softmax_of_the_models_answer(channels_last: bool) -> None:
    bundle, network = make_bundle(channels_last=channels_last), make_model(channels_last)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    predictor = Predictor(bundle, network.state_dict())
    probabilities = predictor.predict(images)
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (5, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    normalize = Normalizer(bundle.preprocessing, CPU, channels_last)
    with torch.inference_mode():
        expected = network(normalize(torch.from_numpy(images))).softmax(1).numpy()
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)


def test_a_prediction_does_not_depend_on_its_batch(model: nn.Module) -> None:
    predictor = Predictor(make_bundle(), model.state_dict())
    images = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    alone = np.concatenate([predictor.predict(images[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(predictor.predict(images), alone, rtol=1e-4)


def test_a_predictor_says_how_much_memory_it_takes(model: nn.Module) -> None:
    parameters = 11_689_512 - 997 * 513 - 7_680
    predictor = Predictor(make_bundle(), model.state_dict())
    assert parameters * 4 < predictor.num_bytes < parameters * 4 + 100_000
