"""Loaded models, the latest used ones, bounded by the memory that they take.

Used by the inference thread alone, so it needs no lock: a model is loaded once however many
requests wait for it, and the one in use is never the one that goes. Others may read `loaded`.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from api.serving.acceleration import Accelerator
from shared.bundle_files import MODEL_FILES, WEIGHTS_FILE
from shared.errors import CheckpointCorrupt
from shared.storage import Storage
from skipline.schemas import LoadedModel, LoadedModels

if TYPE_CHECKING:
    from shared.vision.predictor import Predictor

log = structlog.get_logger(__name__)

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""Of glibc's alone."""
USES_BEFORE_CONVERSION = 8
"""Batches. Who is asked for less often is not worth the seconds of a core that it takes."""


@dataclass
class _Entry:
    """`converted`: the name of its file for onnxruntime; None once that is not asked for."""

    model: Predictor
    facts: LoadedModel
    folder: Path
    converted: str | None
    num_uses: int = 0


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
        accelerator: converts those that are used often.
    """

    def __init__(
        self,
        storage: Storage,
        max_bytes: int,
        device: str,
        accelerator: Accelerator | None = None,
    ) -> None:
        self._storage = storage
        self._max_bytes = max_bytes
        self._device = device
        self._accelerator = accelerator
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
            name = None if self._accelerator is None else self._accelerator.name(file.parent)
            entry = _Entry(model, _facts(key, model), file.parent, name)
            self._entries[key.checkpoint_id] = entry
        else:
            entry.facts = entry.facts.model_copy(update={"used_at": datetime.now(UTC)})
        self._accelerate(entry)
        self._entries.move_to_end(key.checkpoint_id)
        self._tell()
        return entry.model

    def _accelerate(self, entry: _Entry) -> None:
        """Lets onnxruntime answer as soon as it can."""
        if self._accelerator is None or entry.converted is None:
            return
        entry.num_uses += 1
        path = self._accelerator.find(entry.converted)
        if path is not None:
            entry.converted = None
            try:
                entry.model.accelerate(path)
                _give_back()
            except Exception as error:  # of onnxruntime's, which knows many
                path.unlink(missing_ok=True)
                log.warning("a converted model cannot be used", reason=str(error)[:1000])
            entry.facts = entry.facts.model_copy(
                update={"backend": entry.model.backend, "num_bytes": entry.model.num_bytes}
            )
        elif entry.num_uses == USES_BEFORE_CONVERSION:
            self._accelerator.ask(entry.converted, entry.folder)

    def _verified(self, key: ModelKey) -> Path:
        """The file with the weights, which is as it was written. Before others make room: a damaged
        one drives none of them out."""
        return self._storage.verify(key.storage_key, *MODEL_FILES) / WEIGHTS_FILE

    def _load(self, key: ModelKey, folder: Path) -> Predictor:
        from shared.vision.bundle import read_bundle
        from shared.vision.predictor import Predictor

        bundle, weights = read_bundle(folder)
        if bundle.preprocessing.image_size != key.image_size:
            raise CheckpointCorrupt("The checkpoint is for images of another size than its job's")
        model = Predictor(bundle, weights, self._device, lambda: read_bundle(folder)[1])
        _give_back()
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


def _give_back() -> None:
    """Hands free memory back to the system. Loading a model leaves as much of it behind as its
    weights take, and the allocator would keep that, and that of models which have gone."""
    if _trim is not None:
        _trim(0)


def _facts(key: ModelKey, model: Predictor) -> LoadedModel:
    now = datetime.now(UTC)
    return LoadedModel(
        checkpoint_id=key.checkpoint_id,
        arch=model.bundle.spec.model.arch,
        backend=model.backend,
        num_bytes=model.num_bytes,
        loaded_at=now,
        used_at=now,
    )
