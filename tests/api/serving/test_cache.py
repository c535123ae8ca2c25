from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from api.serving.cache import ModelCache, ModelKey
from shared.errors import CheckpointCorrupt

BUNDLE = SimpleNamespace(spec=SimpleNamespace(model=SimpleNamespace(arch="resnet18")))


@dataclass
class Model:
    num_bytes: int
    bundle: ClassVar[Any] = BUNDLE


@pytest.fixture
def loads() -> list[str]:
    return []


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, loads: list[str]) -> Any:
    """A cache of 100 bytes; a model's size is the number in its name, and one is damaged."""

    def load(self: Any, key: ModelKey) -> Model:
        loads.append(key.checkpoint_id)
        if key.checkpoint_id == "damaged":
            raise CheckpointCorrupt("A test says so")
        return Model(int(key.checkpoint_id.split("-")[1]))

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


def test_a_model_larger_than_the_cache_stays_until_the_next(cache: Any, loads: list[str]) -> None:
    cache.get(key("a-40"))
    cache.get(key("huge-500"))
    cache.get(key("huge-500"))
    assert (cache.num_bytes, loads) == (500, ["a-40", "huge-500"])
    cache.get(key("a-40"))
    assert cache.num_bytes == 40


def test_a_damaged_model_is_not_kept(cache: Any, loads: list[str]) -> None:
    for _ in range(2):
        with pytest.raises(CheckpointCorrupt):
            cache.get(key("damaged"))
    assert loads == ["damaged", "damaged"]
    assert cache.num_bytes == 0


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
