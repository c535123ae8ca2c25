"""`GET /compare`: two models on the same images."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from sqlalchemy.orm import Session

from api import examples, openapi
from api.dependencies import ServicesDep, is_id
from shared import comparison, datasets, repository
from shared.comparison import Images, Outcomes
from shared.errors import DatasetNotFound, ModelNotFound, NotEvaluated
from shared.tables import Checkpoint, Dataset
from skipline import schemas
from skipline.specs import TrainSpec, load_spec

router = APIRouter(tags=["models"])

Reference = Annotated[str, Query(description="An alias, or the id of a job or of a checkpoint")]


@router.get(
    "/compare",
    summary="Compare two models",
    responses=openapi.responses(examples.COMPARISON, problems=(404, 409, 422)),
)
def compare_models(
    a: Reference,
    b: Reference,
    services: ServicesDep,
    dataset: Annotated[str | None, Query(description="What a was trained on by default")] = None,
    split: Annotated[
        Literal["train", "val", "test"] | None, Query(description="test by default, else val")
    ] = None,
) -> schemas.Comparison:
    """On the images that both were evaluated on, at the end of a training or by a job of kind
    `evaluate`: is one better than chance explains, in which classes, and on which images? 409
    `not_evaluated` names the evaluation that is missing."""
    if not is_id(a) or not is_id(b):
        raise ModelNotFound("There is no checkpoint, no job and no alias of this name")
    if dataset is not None and not dataset.isprintable():
        raise DatasetNotFound("There is no stored dataset of this id, label or name")
    with services.database.read_scope() as session:
        checkpoints = [repository.find_model(session, reference) for reference in (a, b)]
        reference = dataset or repository.get_job(session, checkpoints[0].job_id).dataset_id
        row, name = datasets.get_split(session, reference, split)
        first, second = (_outcomes(session, checkpoint, row, name) for checkpoint in checkpoints)
        models = _model(session, checkpoints[0]), _model(session, checkpoints[1])
        images = Images(row.name, row.id, name, tuple(row.classes))
    found = comparison.compare(models, (first, second), images)
    if found is None:
        raise NotEvaluated(
            "No image was shown to both: each training held other ones out. Evaluate both on the "
            "same split"
        )
    return found


def _outcomes(session: Session, checkpoint: Checkpoint, dataset: Dataset, split: str) -> Outcomes:
    outcomes = repository.find_outcomes(session, checkpoint, dataset.id, split)
    if outcomes is None:
        raise NotEvaluated(
            f"What the checkpoint {checkpoint.id} said of each image of {dataset.name}/{split} is "
            f"not stored: post a job of kind evaluate with model {checkpoint.id}, dataset "
            f"{dataset.id} and split {split}, and ask again when it has succeeded"
        )
    return Outcomes.decode(outcomes)


def _model(session: Session, checkpoint: Checkpoint) -> schemas.ComparedModel:
    spec = load_spec(repository.get_job(session, checkpoint.job_id).spec)
    assert isinstance(spec, TrainSpec), "only trainings make models"
    return schemas.ComparedModel(
        checkpoint_id=checkpoint.id,
        job_id=checkpoint.job_id,
        arch=spec.model.arch,
        epoch=checkpoint.epoch,
    )
