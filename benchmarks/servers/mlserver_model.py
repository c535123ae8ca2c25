"""MLServer, with adaptive batching."""

from __future__ import annotations

import json

from classifier import classify, load, pixels
from mlserver import MLModel
from mlserver.codecs import Base64Codec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Classifier(MLModel):
    async def load(self) -> bool:
        self.network = load()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        images = [pixels(data) for data in Base64Codec.decode_input(payload.inputs[0])]
        answers = [json.dumps(answer) for answer in classify(self.network, images)]
        output = StringCodec.encode_output("answers", answers)
        return InferenceResponse(model_name=self.name, outputs=[output])
