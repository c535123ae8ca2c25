"""What a process does before it says that it is ready to predict."""

from __future__ import annotations

import threading

import numpy as np
import structlog

from api.checks import NotYet
from api.serving.inference import Inference
from api.stored_models import StoredModels
from skipline.specs import PRODUCTION

log = structlog.get_logger(__name__)


class WarmUp:
    """Lets what `production` stands for answer once, in a thread of its own: from then on a
    prediction waits neither for torch nor for that model. Where there is no such alias, or it
    cannot be used, it ends with torch in memory."""

    def __init__(self, models: StoredModels, inference: Inference) -> None:
        self._models = models
        self._inference = inference
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="warm-up", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises `NotYet` until it is over."""
        if not self._is_over.is_set():
            raise NotYet("warming up")

    def _run(self) -> None:
        try:
            self._inference.started.wait()
            model = self._models.find(PRODUCTION)
            size = model.key.image_size
            image = np.zeros((1, size, size, 3), np.uint8)
            self._inference.submit(model.key, image).result()
        except Exception as error:  # Each request will be told what is wrong with its own model.
            log.warning("nothing to warm up", error=str(error))
        self._is_over.set()
