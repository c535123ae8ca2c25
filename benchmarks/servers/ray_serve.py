"""Ray Serve, with batching."""

from __future__ import annotations

import os
from typing import Any

import ray
from classifier import MAX_BATCH, classify, load, pixels
from ray import serve
from starlette.requests import Request


@serve.deployment
class Classifier:
    def __init__(self) -> None:
        self.network = load()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=float(os.environ["BATCH_WAIT"]))
    async def classify(self, images: list[bytes]) -> list[dict[str, Any]]:
        return classify(self.network, [pixels(image) for image in images])

    async def __call__(self, request: Request) -> dict[str, Any]:
        answer: dict[str, Any] = await self.classify(await request.body())
        return answer


if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"port": int(os.environ["PORT"])})
    serve.run(Classifier.bind(), blocking=True)
