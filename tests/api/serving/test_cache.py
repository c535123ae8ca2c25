from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from api.serving.cache import ModelCache, ModelKey
from shared.errors import CheckpointCorrupt

BUNDLE = SimpleNamespace(spec=SimpleNamespace(model=SimpleNamespace(arch="resnet18")))


@dataclass
class Model:
    backend = "torch"
    num_bytes: int
    bundle: ClassVar[Any] = BUNDLE


@pytest.fixture
def loads() -> list[str]:
    return []


@pytest.fixture
def in_memory() -> list[int]:
    """Bytes in memory at each load, the loaded model's included."""
    return []


@pytest.fixture
def cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loads: list[str], in_memory: list[int]
) -> Any:
    """A cache of 100 bytes; a model's size is the number in its name, and one is damaged."""

    def verified(self: Any, key: ModelKey) -> Path:
        if key.checkpoint_id == "damaged":
            raise CheckpointCorrupt("A test says so")
        file = tmp_path / key.checkpoint_id
        file.write_bytes(bytes(int(key.checkpoint_id.split("-")[1])))
        return file

    def load(self: Any, key: ModelKey, folder: Path) -> Model:
        size = int(key.checkpoint_id.split("-")[1])
        loads.append(key.checkpoint_id)
        in_memory.append(self.num_bytes + size)
        return Model(size)

    monkeypatch.setattr(ModelCache, "_verified", verified)
    monkeypatch.setattr(ModelCache, "_load", load)
    return ModelCache(None, 100, "cpu")  # type: ignore[arg-type]


def key(name: str) -> ModelKey:
    return ModelKey(name, name, 32)


def test_a_model_is_loaded_once(cache: Any, loads: list[str]) -> None:
    assert cache.get(key("a-10")) is cache.get(key("a-10"))
    assert loads == ["a-10"]


def test_the_models_used_longest_ago_make_room(cache: Any, loads: list[str]) -> None:
    for name in ("a-40", "b-40", "a-40", "c-40"):
        cache.get(key(name))
    assert cache.num_bytes == 80
    loads.clear()
    cache.get(key("a-40"))
    cache.get(key("c-40"))
    assert loads == []
    cache.get(key("b-40"))
    assert loads == ["b-40"]


def test_room_is_made_before_a_model_is_loaded(cache: Any, in_memory: list[int]) -> None:
    for name in ("a-40", "b-40", "c-40", "huge-500", "d-90"):
        cache.get(key(name))
    assert in_memory == [40, 80, 80, 500, 90]


def test_a_model_larger_than_the_cache_stays_until_the_next(cache: Any, loads: list[str]) -> None:
    cache.get(key("a-40"))
    cache.get(key("huge-500"))
    cache.get(key("huge-500"))
    assert (cache.num_bytes, loads) == (500, ["a-40", "huge-500"])
    cache.get(key("a-40"))
    assert cache.num_bytes == 40


def test_a_damaged_model_is_not_kept_and_drives_no_other_out(cache: Any, loads: list[str]) -> None:
    cache.get(key("a-100"))
    for _ in range(2):
        with pytest.raises(CheckpointCorrupt):
            cache.get(key("damaged"))
    cache.get(key("a-100"))
    assert (loads, cache.num_bytes) == (["a-100"], 100)


def test_it_tells_what_is_there_the_latest_used_first(cache: Any) -> None:
    assert cache.loaded.items == []
    for name in ("a-40", "b-40", "a-40"):
        cache.get(key(name))
    loaded = cache.loaded
    assert [(item.checkpoint_id, item.num_bytes) for item in loaded.items] == [
        ("a-40", 40),
        ("b-40", 40),
    ]
    assert (loaded.num_bytes, loaded.max_bytes) == (80, 100)
    assert loaded.items[0].loaded_at <= loaded.items[1].loaded_at <= loaded.items[0].used_at
    cache.get(key("c-50"))
    assert [item.checkpoint_id for item in cache.loaded.items] == ["c-50", "a-40"]
    assert [item.checkpoint_id for item in loaded.items] == ["a-40", "b-40"], "what was told stays"
    with pytest.raises(CheckpointCorrupt):
        cache.get(key("damaged"))
    assert [item.checkpoint_id for item in cache.loaded.items] == ["c-50", "a-40"]
