"""BentoML, with adaptive batching."""

from __future__ import annotations

from typing import Any

import bentoml
from classifier import MAX_BATCH, classify, load, pixels_of
from PIL.Image import Image


@bentoml.service(workers=1)
class Classifier:
    def __init__(self) -> None:
        self.network = load()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH)
    def classify(self, images: list[Image]) -> list[dict[str, Any]]:
        return classify(self.network, [pixels_of(image) for image in images])
