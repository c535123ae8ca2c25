"""Models in single files: whatever reads them gives the answers that the server gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import safetensors.torch
import torch
from torch import nn

from shared.answers import calibrated
from shared.errors import BadModelFile
from shared.vision.architectures import build_model
from shared.vision.bundle import Bundle, BundleDataset
from shared.vision.portable import EXTRA_FILE, METADATA_KEY, Portable, digest, export, read_portable
from shared.vision.predictor import Predictor
from shared.vision.preprocessing import Normalizer, Preprocessing
from skipline.catalog import EXPORT_SUFFIXES
from skipline.schemas import ExportFormat, PredictingModel
from skipline.specs import ModelSpec, TrainSpec

NUM_IMAGES = 100
TEMPERATURE = 1.7
ROUNDING = 1e-4
"""Of probabilities. Weights that were drawn hardly tell noise from noise, so that the last layer is
scaled up here, and with it what is rounded; of trained networks it is less than 1e-5."""


def trained(
    arch: str, image_size: int, **model: Any
) -> tuple[Portable, dict[str, torch.Tensor], npt.NDArray[np.uint8]]:
    """A network as training leaves it, with its norms' statistics away from 0 and 1, that tells
    images apart; and images, uint8 [100, S, S, 3]."""
    spec = TrainSpec(dataset="d", model=ModelSpec(arch=arch, **model), image_size=image_size)
    preprocessing = Preprocessing(
        image_size=image_size, channel_mean=(0.49, 0.48, 0.45), channel_std=(0.25, 0.24, 0.26)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_model(spec.model, 10, image_size)
        images = np.random.default_rng(0).integers(
            0, 256, (NUM_IMAGES, image_size, image_size, 3), dtype=np.uint8
        )
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None
        network.train()
        normalize = Normalizer(preprocessing, torch.device("cpu"))
        with torch.no_grad():
            pixels = normalize(torch.from_numpy(images))
            network(pixels)
            # Logits that differ from image to image by about 2: neither sure nor clueless.
            spread = network.eval()(pixels).std(dim=0).mean()
            last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
            last.weight.mul_(2 / spread)
    bundle = Bundle(
        spec=spec,
        classes=tuple(f"class {place}" for place in range(10)),
        preprocessing=preprocessing,
        dataset=BundleDataset(name="d", id="d-1", hash="0123"),
        epoch=3,
        step=30,
        metrics={"val_loss": 0.5},
    )
    model = PredictingModel(
        checkpoint_id="c-1", job_id="j-1", arch=arch, epoch=3, step=30, temperature=TEMPERATURE
    )
    weights = {name: weight.detach().clone() for name, weight in network.state_dict().items()}
    return Portable(model=model, bundle=bundle), weights, images


@pytest.fixture(scope="module")
def model() -> tuple[Portable, dict[str, torch.Tensor], npt.NDArray[np.uint8]]:
    return trained("resnet18", 32)


def served(
    portable: Portable, weights: dict[str, torch.Tensor], images: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float32]:
    """What the server answers."""
    return calibrated(Predictor(portable.bundle, weights).predict(images), TEMPERATURE)


Answers = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]


def opened(path: Path, format: ExportFormat) -> tuple[str, Answers]:
    """What the file says of itself, and what it answers, read as its users read it."""
    if format == "onnx":
        session = onnxruntime.InferenceSession(path)
        document = session.get_modelmeta().custom_metadata_map[METADATA_KEY]
        return document, lambda images: session.run(["probabilities"], {"images": images})[0]
    extra = {EXTRA_FILE: ""}
    if format == "torchscript":
        module = torch.jit.load(path, _extra_files=extra)
    else:
        module = torch.export.load(path, extra_files=extra).module()
    said = extra[EXTRA_FILE]
    document = said if isinstance(said, str) else bytes(said).decode()

    def answer(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            found: npt.NDArray[np.float32] = module(torch.from_numpy(images)).numpy()
        return found

    return document, answer


@pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated:FutureWarning")
@pytest.mark.parametrize("format", ["onnx", "torchscript", "torch_export"])
def test_every_format_answers_as_the_server_does(
    model: Any, tmp_path: Path, format: ExportFormat
) -> None:
    portable, weights, images = model
    path = tmp_path / f"model{EXPORT_SUFFIXES[format]}"
    export(portable, weights, format, path)
    document, answer = opened(path, format)
    expected = served(portable, weights, images)
    assert expected.max(axis=1).std() > 0.05, "the network tells images apart"
    # Batches of any size, one after the other.
    found = np.concatenate([answer(images[:1]), answer(images[1:4]), answer(images[4:])])
    np.testing.assert_allclose(found, expected, atol=ROUNDING)
    told = Portable.model_validate_json(document)
    assert told.bundle.classes == portable.bundle.classes
    assert told.bundle.preprocessing == portable.bundle.preprocessing
    assert told.model == portable.model


@pytest.mark.parametrize(
    ("arch", "image_size", "settings"),
    [("resnet18", 32, {}), ("resnet50", 24, {"dropout": 0.3}), ("vgg11_bn", 32, {})],
)
def test_onnxruntime_names_the_same_five_classes_for_a_hundred_images(
    tmp_path: Path, arch: str, image_size: int, settings: dict[str, Any]
) -> None:
    portable, weights, images = trained(arch, image_size, **settings)
    export(portable, weights, "onnx", tmp_path / "model.onnx")
    _, answer = opened(tmp_path / "model.onnx", "onnx")
    expected, found = served(portable, weights, images), answer(images)
    np.testing.assert_allclose(found, expected, atol=ROUNDING)
    for own, other in zip(expected, found, strict=True):
        best, others = (np.argsort(-row, kind="stable")[:5] for row in (own, other))
        # Where two are as good as equal, either may come first.
        swapped = best != others
        np.testing.assert_allclose(own[best[swapped]], own[others[swapped]], atol=ROUNDING)


def test_safetensors_holds_the_weights_bit_by_bit(model: Any, tmp_path: Path) -> None:
    portable, weights, _ = model
    path = tmp_path / "model.safetensors"
    export(portable, weights, "safetensors", path)
    told, found = read_portable(path)
    assert (told.model, told.bundle) == (portable.model, portable.bundle)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_a_file_that_is_damaged_or_of_something_else_is_refused(model: Any, tmp_path: Path) -> None:
    portable, weights, _ = model
    path = tmp_path / "model.safetensors"
    export(portable, weights, "safetensors", path)
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-1000] ^= 1
    header = data.index(b"bundle")
    other = dict(weights) | {"fc.bias": torch.zeros(3)}
    sha256 = digest(other)
    mismatch = portable.model_copy(update={"weights_sha256": sha256})
    metadata = {METADATA_KEY: mismatch.model_dump_json()}
    files = {
        "damaged": bytes(flipped),
        "cut short": data[:-1000],
        "no safetensors": b"PK\3\4" + bytes(100),
        "cannot be understood": data[:header] + b"dnubel" + data[header + 6 :],
        "says nothing": safetensors.torch.save(weights, {"format": "pt"}),
        "not those of the network": safetensors.torch.save(other, metadata),
        "no safetensors, or": b"",
    }
    for message, wrong in files.items():
        path.write_bytes(wrong)
        with pytest.raises(BadModelFile, match=message):
            read_portable(path)


def test_the_digest_knows_names_types_shapes_and_values() -> None:
    weights = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    same = {"b": torch.zeros(2), "a": torch.arange(6.0)}
    assert digest(weights) == digest(same)
    others = [
        {"c": torch.arange(6.0), "b": torch.zeros(2)},
        {"a": torch.arange(6.0).double(), "b": torch.zeros(2)},
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)},
        {"a": torch.arange(6.0) + 1, "b": torch.zeros(2)},
    ]
    assert len({digest(weights), *map(digest, others)}) == 5


def test_the_metadata_is_json_that_anybody_can_read(model: Any, tmp_path: Path) -> None:
    portable, weights, _ = model
    path = tmp_path / "model.onnx"
    export(portable, weights, "onnx", path)
    document = json.loads(opened(path, "onnx")[0])
    assert document["bundle"]["classes"][3] == "class 3"
    assert document["bundle"]["preprocessing"]["image_size"] == 32
    assert document["model"]["temperature"] == TEMPERATURE
    assert document["report"] is None
