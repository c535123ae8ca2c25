"""Loaded models, the latest used ones, bounded by the memory that they take.

Used by the inference thread alone, so it needs no lock: a model is loaded once however many
requests wait for it, and the one in use is never the one that goes. Others may read `loaded`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
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
        max_bytes: of the weights in memory, the one that is being loaded included: others make
            room before. A model that is larger is loaded alone.
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
            file = self._verified(key)
            self._make_room(file.stat().st_size)
            model = self._load(key, file.parent)
            entry = self._entries[key.checkpoint_id] = _Entry(model, _facts(key, model))
        else:
            entry.facts = entry.facts.model_copy(update={"used_at": datetime.now(UTC)})
        self._entries.move_to_end(key.checkpoint_id)
        self._tell()
        return entry.model

    def _verified(self, key: ModelKey) -> Path:
        """The file with the weights, which is as it was written. Before others make room: a damaged
        one drives none of them out."""
        from shared.vision.bundle import BUNDLE_FILE, WEIGHTS_FILE

        return self._storage.verify(key.storage_key, WEIGHTS_FILE, BUNDLE_FILE) / WEIGHTS_FILE

    def _load(self, key: ModelKey, folder: Path) -> Predictor:
        from shared.vision.bundle import read_bundle
        from shared.vision.predictor import Predictor

        bundle, weights = read_bundle(folder)
        if bundle.preprocessing.image_size != key.image_size:
            raise CheckpointCorrupt("The checkpoint is for images of another size than its job's")
        model = Predictor(bundle, weights, self._device)
        log.info("model loaded", checkpoint_id=key.checkpoint_id, num_bytes=model.num_bytes)
        return model

    def _make_room(self, num_bytes: int) -> None:
        while self._entries and self.num_bytes + num_bytes > self._max_bytes:
            self._entries.popitem(last=False)
        self._tell()

    def _tell(self) -> None:
        self.loaded = LoadedModels(
            items=[entry.facts for entry in reversed(self._entries.values())],
            num_bytes=self.num_bytes,
            max_bytes=self._max_bytes,
        )

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
