"""`GET /compare`: two models on the same images."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy.orm import Session

from api import examples, openapi
from api.dependencies import JudgedByDep, ServicesDep
from api.references import check_model_reference
from shared import comparison, datasets, repository
from shared.comparison import Images, Outcomes
from shared.errors import NotEvaluated
from shared.tables import Checkpoint
from skipline import schemas

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
    judged_by: JudgedByDep,
    services: ServicesDep,
) -> schemas.Comparison:
    """On the images that both were evaluated on, at the end of a training or by a job of kind
    `evaluate`; by default of what `a` was trained on. Is one better than chance explains, in which
    classes, and on which images? 409 `not_evaluated` names the evaluation that is missing."""
    for reference in (a, b):
        check_model_reference(reference)
    with services.database.read_scope() as session:
        checkpoints = [repository.find_model(session, reference) for reference in (a, b)]
        trained_on = repository.get_job(session, checkpoints[0].job_id).dataset_id
        dataset = judged_by.dataset or trained_on
        row, name = datasets.get_split(session, dataset, judged_by.split)
        first, second = (
            Outcomes.decode(repository.outcomes_on(session, checkpoint, row, name))
            for checkpoint in checkpoints
        )
        models = _model(session, checkpoints[0]), _model(session, checkpoints[1])
        images = Images(row.name, row.id, name, tuple(row.classes))
    found = comparison.compare(models, (first, second), images)
    if found is None:
        raise NotEvaluated(
            "No image was shown to both: each training held other ones out. Evaluate both on the "
            "same split"
        )
    return found


def _model(session: Session, checkpoint: Checkpoint) -> schemas.ComparedModel:
    spec = repository.trained_spec(repository.get_job(session, checkpoint.job_id))
    return schemas.ComparedModel(
        checkpoint_id=checkpoint.id,
        job_id=checkpoint.job_id,
        arch=spec.model.arch,
        epoch=checkpoint.epoch,
    )
