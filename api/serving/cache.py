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
        self._models: OrderedDict[str, Predictor] = OrderedDict()
        self._facts: dict[str, LoadedModel] = {}
        self.loaded = LoadedModels(items=[], num_bytes=0, max_bytes=max_bytes)
        """What is there now: replaced whole, so that any thread may read it."""

    def get(self, key: ModelKey) -> Predictor:
        """The model, loaded if need be. A damaged one is not kept: raises `CheckpointCorrupt`."""
        name = key.checkpoint_id
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = self._load(key)
        self._models.move_to_end(name)
        self._evict()
        self._tell(name, model)
        return model

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
        while len(self._models) > 1 and self.num_bytes > self._max_bytes:
            name, _ = self._models.popitem(last=False)
            self._facts.pop(name)

    def _tell(self, name: str, used: Predictor) -> None:
        now = datetime.now(UTC)
        known = self._facts.get(name)
        self._facts[name] = LoadedModel(
            checkpoint_id=name,
            arch=used.bundle.spec.model.arch,
            num_bytes=used.num_bytes,
            loaded_at=known.loaded_at if known else now,
            used_at=now,
        )
        self.loaded = LoadedModels(
            items=[self._facts[name] for name in reversed(self._models)],
            num_bytes=self.num_bytes,
            max_bytes=self._max_bytes,
        )

    @property
    def num_bytes(self) -> int:
        """What all weights take."""
        return sum(model.num_bytes for model in self._models.values())
