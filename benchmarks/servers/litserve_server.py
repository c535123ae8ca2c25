"""LitServe, with batching. It looks at annotations, which must not be texts."""

import os
from typing import Any

import litserve
from classifier import MAX_BATCH, classify, load, pixels
from fastapi import UploadFile


class Classifier(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.network = load()

    def decode_request(self, request: UploadFile) -> Any:
        return pixels(request.file.read())

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, images: Any) -> list[dict[str, Any]]:
        return classify(self.network, images)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    api = Classifier(max_batch_size=MAX_BATCH, batch_timeout=float(os.environ["BATCH_WAIT"]))
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(port=int(os.environ["PORT"]), generate_client_file=False, log_level="warning")
