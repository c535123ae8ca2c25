"""What most people write: an endpoint of FastAPI's, a plain function, one image at a time."""

from __future__ import annotations

import os
from typing import Annotated, Any

import uvicorn
from classifier import classify, load, pixels
from fastapi import Body, FastAPI

network = load()
app = FastAPI()


@app.get("/ready")
def ready() -> None: ...


@app.post("/predict")
def predict(image: Annotated[bytes, Body(media_type="image/png")]) -> dict[str, Any]:
    return classify(network, [pixels(image)])[0]


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PORT"]), log_level="warning")
