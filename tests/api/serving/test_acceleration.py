"""Models that onnxruntime answers for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from api.serving import acceleration
from api.serving.acceleration import Accelerator
from api.serving.cache import USES_BEFORE_CONVERSION, ModelCache, ModelKey
from shared.storage import Storage
from shared.vision.architectures import build_model
from shared.vision.bundle import Bundle, BundleDataset, write_bundle
from shared.vision.preprocessing import Preprocessing
from skipline.specs import ModelSpec, TrainSpec

SIZE = 32
KEY = ModelKey("c-1", "jobs/j/1/1", SIZE)
MIB = 2**20


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """With one small model."""
    spec = TrainSpec(dataset="d", model=ModelSpec(arch="resnet18"), image_size=SIZE)
    half = (0.5, 0.5, 0.5)
    bundle = Bundle(
        spec=spec,
        classes=("a", "b", "c"),
        preprocessing=Preprocessing(image_size=SIZE, channel_mean=half, channel_std=half),
        dataset=BundleDataset(name="d", id="d", hash="d"),
        epoch=1,
        step=1,
        metrics={},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = build_model(spec.model, 3, SIZE).state_dict()
    storage = Storage(tmp_path / "artifacts")
    with storage.writing(KEY.storage_key, "test") as folder:
        write_bundle(folder, bundle, weights)
    return storage


@pytest.fixture
def accelerator(tmp_path: Path) -> Iterator[Accelerator]:
    accelerator = Accelerator(tmp_path / "onnx", 1000 * MIB)
    yield accelerator
    accelerator.stop()


def drawn(number: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (number, SIZE, SIZE, 3), dtype=np.uint8)


def test_a_model_that_is_asked_often_is_converted_and_answers_the_same(
    storage: Storage, accelerator: Accelerator, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    cache = ModelCache(storage, 1000 * MIB, "cpu", accelerator)
    images = drawn(5)
    for _ in range(USES_BEFORE_CONVERSION - 1):
        model = cache.get(KEY)
    expected, look = model.predict(images), model.look(images)
    num_bytes = model.num_bytes
    assert not (tmp_path / "onnx").exists()
    assert cache.loaded.items[0].backend == "torch"
    cache.get(KEY)
    wait_for(lambda: list((tmp_path / "onnx").glob("*.onnx")), "converted model")
    assert cache.get(KEY) is model
    assert (model.backend, cache.loaded.items[0].backend) == ("onnxruntime", "onnxruntime")
    for count in (5, 1, 3):
        found = model.predict(images[:count])
        np.testing.assert_allclose(found, expected[:count], atol=1e-5)
    assert model.num_bytes == num_bytes
    # Torch's weights come back for a closer look, and count.
    again = model.look(images)
    np.testing.assert_allclose(again.features, look.features, atol=1e-5)
    assert model.num_bytes == 2 * num_bytes

    # Whoever comes later finds the file.
    other = ModelCache(storage, 1000 * MIB, "cpu", accelerator)
    assert other.get(KEY).backend == "onnxruntime"


def test_a_converted_model_that_is_damaged_is_thrown_away_and_torch_answers(
    storage: Storage, accelerator: Accelerator, tmp_path: Path
) -> None:
    path = tmp_path / "onnx" / accelerator.name(storage.path(KEY.storage_key))
    path.parent.mkdir()
    path.write_bytes(b"this is no model")
    cache = ModelCache(storage, 1000 * MIB, "cpu", accelerator)
    model = cache.get(KEY)
    assert model.backend == "torch"
    assert model.predict(drawn(2)).shape == (2, 3)
    assert not path.exists()


def test_a_conversion_that_fails_leaves_nothing_and_torch_answering(
    storage: Storage,
    accelerator: Accelerator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wait_for: Callable[..., Any],
) -> None:
    monkeypatch.setattr(acceleration.sys, "executable", "/bin/false")
    tried = threading.Event()
    convert = Accelerator._convert

    def noted(self: Accelerator, *rest: Any) -> None:
        try:
            convert(self, *rest)
        finally:
            tried.set()

    monkeypatch.setattr(Accelerator, "_convert", noted)
    cache = ModelCache(storage, 1000 * MIB, "cpu", accelerator)
    for _ in range(USES_BEFORE_CONVERSION + 1):
        model = cache.get(KEY)
    assert tried.wait(20)
    assert list((tmp_path / "onnx").iterdir()) == []
    assert model.predict(drawn(1)).shape == (1, 3)


def test_files_that_were_used_longest_ago_make_room(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., Any]
) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    for age, name in ((300, "old"), (100, "young")):
        path = folder / f"{name}.onnx"
        path.write_bytes(bytes(10))
        os.utime(path, (path.stat().st_mtime - age, path.stat().st_mtime - age))

    def write(self: Accelerator, name: str, bundle_folder: Path) -> None:
        (folder / name).write_bytes(bytes(10))

    monkeypatch.setattr(Accelerator, "_convert", write)
    accelerator = Accelerator(folder, 20)
    try:
        accelerator.ask("new.onnx", tmp_path)
        wait_for(lambda: not (folder / "old.onnx").exists(), "room")
        assert sorted(path.name for path in folder.iterdir()) == ["new.onnx", "young.onnx"]
        assert accelerator.find("old.onnx") is None
        # Used now, it is younger than any other.
        assert accelerator.find("young.onnx") == folder / "young.onnx"
        accelerator.ask("newer.onnx", tmp_path)
        wait_for(lambda: not (folder / "new.onnx").exists(), "room")
        assert (folder / "young.onnx").exists()
    finally:
        accelerator.stop()


def test_it_ends_at_once_in_the_middle_of_a_conversion(
    storage: Storage, accelerator: Accelerator, tmp_path: Path, wait_for: Callable[..., Any]
) -> None:
    folder = storage.path(KEY.storage_key)
    accelerator.ask(accelerator.name(folder), folder)
    wait_for(lambda: accelerator._process is not None, "conversion")
    accelerator.stop()
    assert not accelerator._thread.is_alive()
    assert list((tmp_path / "onnx").iterdir()) == []
