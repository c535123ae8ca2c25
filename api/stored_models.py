"""Which checkpoint a client means, asked of the database at each prediction: a move of an alias
holds from the answer on. What else there is to know of a model is read once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from api.references import check_model_reference
from api.serving.cache import ModelKey
from shared import repository
from shared.answers import predicting_model
from shared.database import Database
from skipline import schemas

MAX_KEPT = 4096
"""Descriptions of models, a few hundred bytes each."""


@dataclass(frozen=True)
class StoredModel:
    """The checkpoint that a client means."""

    key: ModelKey
    document: schemas.PredictingModel


class StoredModels:
    """May be asked by many threads."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: OrderedDict[str, StoredModel] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, reference: str) -> StoredModel:
        """Raises `ModelNotFound` or `NoCheckpointYet`."""
        check_model_reference(reference)
        with self._database.read_scope() as session:
            checkpoint_id = repository.find_checkpoint_id(session, reference)
            with self._lock:
                known = self._known.get(checkpoint_id or "")
                if known is not None:
                    self._known.move_to_end(known.key.checkpoint_id)
                    return known
            checkpoint = repository.find_model(session, checkpoint_id or reference)
            document, spec = predicting_model(session, checkpoint)
            # How its answers are calibrated is settled with the report that its training ends with.
            is_settled = repository.has_report(session, checkpoint.job_id)
        assert spec.image_size is not None, "stored specs are resolved"
        found = StoredModel(ModelKey(checkpoint.id, checkpoint.key, spec.image_size), document)
        if is_settled:
            with self._lock:
                self._known[checkpoint.id] = found
                while len(self._known) > MAX_KEPT:
                    self._known.popitem(last=False)
        return found
