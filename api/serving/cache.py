"""Loaded models, the latest used ones, bounded by the memory that they take.

Used by the inference thread alone, so it needs no lock: a model is loaded once however many
requests wait for it, and the one in use is never the one that goes. Others may read `loaded`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from shared.errors import CheckpointCorrupt
from shared.storage import Storage
from skipline.schemas import LoadedModel, LoadedModels

if TYPE_CHECKING:
    from shared.vision.predictor import Predictor

log = structlog.get_logger(__name__)


@dataclass
class _Entry:
    model: Predictor
    facts: LoadedModel


@dataclass(frozen=True)
class ModelKey:
    """A stored checkpoint. `image_size`: the side of the images it takes, in pixels, as its job's
    spec has it."""

    checkpoint_id: str
    storage_key: str
    image_size: int


class ModelCache:
    """Predictors by checkpoint.

    Args:
        max_bytes: of the weights kept. One more model is in memory while it is loaded, and the
            latest one stays even if it is larger.
    """

    def __init__(self, storage: Storage, max_bytes: int, device: str) -> None:
        self._storage = storage
        self._max_bytes = max_bytes
        self._device = device
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self.loaded = LoadedModels(items=[], num_bytes=0, max_bytes=max_bytes)
        """What is there now: replaced whole, so that any thread may read it."""

    def get(self, key: ModelKey) -> Predictor:
        """The model, loaded if need be. A damaged one is not kept: raises `CheckpointCorrupt`."""
        entry = self._entries.get(key.checkpoint_id)
        if entry is None:
            model = self._load(key)
            entry = self._entries[key.checkpoint_id] = _Entry(model, _facts(key, model))
        else:
            entry.facts = entry.facts.model_copy(update={"used_at": datetime.now(UTC)})
        self._entries.move_to_end(key.checkpoint_id)
        self._evict()
        self.loaded = LoadedModels(
            items=[entry.facts for entry in reversed(self._entries.values())],
            num_bytes=self.num_bytes,
            max_bytes=self._max_bytes,
        )
        return entry.model

    def _load(self, key: ModelKey) -> Predictor:
        from shared.vision.bundle import BUNDLE_FILE, WEIGHTS_FILE, read_bundle
        from shared.vision.predictor import Predictor

        folder = self._storage.verify(key.storage_key, WEIGHTS_FILE, BUNDLE_FILE)
        bundle, weights = read_bundle(folder)
        if bundle.preprocessing.image_size != key.image_size:
            raise CheckpointCorrupt("The checkpoint is for images of another size than its job's")
        model = Predictor(bundle, weights, self._device)
        log.info("model loaded", checkpoint_id=key.checkpoint_id, num_bytes=model.num_bytes)
        return model

    def _evict(self) -> None:
        while len(self._entries) > 1 and self.num_bytes > self._max_bytes:
            self._entries.popitem(last=False)

    @property
    def num_bytes(self) -> int:
        """What all weights take."""
        return sum(entry.model.num_bytes for entry in self._entries.values())


def _facts(key: ModelKey, model: Predictor) -> LoadedModel:
    now = datetime.now(UTC)
    return LoadedModel(
        checkpoint_id=key.checkpoint_id,
        arch=model.bundle.spec.model.arch,
        num_bytes=model.num_bytes,
        loaded_at=now,
        used_at=now,
    )
