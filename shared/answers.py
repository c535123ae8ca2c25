"""From a network's probabilities to the answer for an image: the same one whether it was asked by
a client or by a job. Knows nothing of networks, and loads no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sqlalchemy.orm import Session

from shared import repository
from shared.tables import Checkpoint
from skipline.schemas import ImagePrediction, LabelProbability, PredictingModel
from skipline.specs import TrainSpec


def predicting_model(session: Session, checkpoint: Checkpoint) -> tuple[PredictingModel, TrainSpec]:
    """What answers are said to come from, and the training's spec."""
    spec = repository.trained_spec(repository.get_job(session, checkpoint.job_id))
    temperature, reject_below = repository.calibration_of(session, checkpoint)
    document = PredictingModel(
        checkpoint_id=checkpoint.id,
        job_id=checkpoint.job_id,
        arch=spec.model.arch,
        epoch=checkpoint.epoch,
        step=checkpoint.step,
        temperature=temperature,
        reject_below=reject_below,
    )
    return document, spec


def calibrated(
    probabilities: npt.NDArray[np.float32], temperature: float | None
) -> npt.NDArray[np.float32]:
    """The softmax of logits divided by `temperature`, made of the softmax [B, C] of the logits."""
    if temperature is None:
        return probabilities
    # A power of the ratio to the largest, which is 1: never 0 / 0, however high the power.
    powers = (probabilities / probabilities.max(axis=1, keepdims=True)) ** (1 / temperature)
    shares: npt.NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
    return shares


def answers(
    model: PredictingModel,
    names: Sequence[str],
    probabilities: npt.NDArray[np.float32],
    classes: Sequence[str],
    top_k: int,
) -> list[ImagePrediction]:
    """Of images by their names. `probabilities` float32 [B, num_classes], as the network gives
    them; equal ones are named in the order of the classes."""
    return [
        _answer(name, row, classes, top_k, model.reject_below)
        for name, row in zip(names, calibrated(probabilities, model.temperature), strict=True)
    ]


def _answer(
    name: str,
    probabilities: npt.NDArray[np.float32],
    classes: Sequence[str],
    top_k: int,
    reject_below: float | None,
) -> ImagePrediction:
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    top = [
        LabelProbability(
            label=classes[index], index=int(index), probability=float(probabilities[index])
        )
        for index in order
    ]
    confidence = top[0].probability
    unknown = reject_below is not None and confidence < reject_below
    return ImagePrediction(image=name, top=top, confidence=confidence, unknown=unknown)
