"""Models under the names by which they are served."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response
from pydantic import TypeAdapter, ValidationError
from sqlalchemy.exc import IntegrityError

from api import examples, openapi
from api.bodies import json_body
from api.cards import write_card
from api.dependencies import (
    JudgedByDep,
    PageDep,
    Services,
    ServicesDep,
    SubmitterDep,
    unknown_cursor,
)
from api.references import check_model_reference
from shared import aliases, datasets, promotion, repository
from shared.errors import (
    AliasNotFound,
    InvalidInput,
)
from shared.promotion import Guard
from skipline import schemas
from skipline.specs import AliasChange, AliasName, error_items

router = APIRouter(tags=["models"])

_change = TypeAdapter(AliasChange)
_name = TypeAdapter[str](AliasName)
MAX_NUMBER = 2**31 - 1


def parse_change(document: Any) -> AliasChange:
    """Checks what a client sent. Raises pydantic's `ValidationError`."""
    return _change.validate_python(document)


async def _known_name(alias: str) -> str:
    try:
        return _name.validate_python(alias)
    except ValidationError:
        raise AliasNotFound("There is no alias of this name") from None


AliasDep = Annotated[str, Depends(_known_name)]
"""The `alias` of the path, of one that may be there."""


async def _guard(
    require: Annotated[
        str | None,
        Query(max_length=1000, description="Conditions: top1>=0.93,min_class_accuracy>=0.8"),
    ] = None,
    against: Annotated[
        str | None, Query(description="A model than which this one must be no worse")
    ] = None,
    *,
    judged_by: JudgedByDep,
) -> Guard | None:
    """None where nothing is asked of the model."""
    if require is None and against is None:
        for loc, given in asdict(judged_by).items():
            if given is not None:
                message = "Say with require or against what is asked of the model"
                raise InvalidInput(message, errors=[{"loc": loc, "message": message}])
        return None
    if against is not None:
        check_model_reference(against)
    floors = promotion.parse_floors(require) if require is not None else ()
    return Guard(floors, against, judged_by.dataset, judged_by.split)


GuardDep = Annotated[Guard | None, Depends(_guard)]
"""What the query asks of a model."""


@router.get(
    "/models",
    summary="List the models that are served",
    responses=openapi.responses(examples.MODELS, problems=(422,)),
)
def list_models(page: PageDep, services: ServicesDep) -> schemas.Page[schemas.Model]:
    """Each under its alias, by name. Any checkpoint can be asked for by its id besides."""
    with services.database.read_scope() as session:
        rows, next_ = page.cut(aliases.list_aliases(session), lambda row: row.name)
        items = aliases.model_documents(session, rows)
    return schemas.Page[schemas.Model](items=items, next=next_)


@router.get(
    "/models/{alias}",
    summary="Show a model",
    responses=openapi.responses(examples.MODEL, problems=(404,)),
)
def get_model(alias: AliasDep, services: ServicesDep) -> schemas.Model:
    """What the alias stands for."""
    with services.database.read_scope() as session:
        return aliases.model_documents(session, [aliases.get_alias(session, alias)])[0]


@router.put(
    "/models/{alias}",
    summary="Move an alias to a model",
    responses=openapi.responses(examples.MODEL, problems=(400, 404, 409, 413, 415, 422)),
    openapi_extra=openapi.json_body(_change, examples.ALIAS_CHANGES),
)
def put_model(
    alias: str,
    change: Annotated[AliasChange, Depends(json_body(parse_change))],
    services: ServicesDep,
    submitter: SubmitterDep,
    guard: GuardDep,
) -> schemas.Model:
    """Makes the alias, or moves it: from the moment of the answer on, every prediction that asks
    for it comes from the new model. Without `checkpoint_id` only notes and tags are changed.

    With `require` or `against` only if the model's report on these images allows it: 409
    `promotion_refused` names the figures that do not, 409 `not_evaluated` the evaluation that is
    missing."""
    if guard is not None and change.checkpoint_id is None:
        message = "Name the model that is to keep the conditions"
        raise InvalidInput(message, errors=[{"loc": "checkpoint_id", "message": message}])
    try:
        name = _name.validate_python(alias)
    except ValidationError as error:
        message = f"Give 1 to 64 of a-z, 0-9, ., _ and -. {error_items(error)[0]['message']}"
        raise InvalidInput(message, errors=[{"loc": "alias", "message": message}]) from None
    try:
        return _put(services, name, change, submitter, guard)
    except IntegrityError:  # Somebody else made it at this moment.
        return _put(services, name, change, submitter, guard)


def _put(
    services: Services, name: str, change: AliasChange, submitter: str, guard: Guard | None
) -> schemas.Model:
    with services.database.session_scope() as session:
        if change.checkpoint_id is not None and guard is not None:
            check = partial(promotion.check, session, guard, name)
            row = aliases.move_alias(session, name, change.checkpoint_id, submitter, check)
        elif change.checkpoint_id is not None:
            row = aliases.move_alias(session, name, change.checkpoint_id, submitter)
        else:
            row = aliases.get_alias(session, name, lock=True)
        if change.notes is not None:
            row.notes = change.notes
        if change.tags is not None:
            row.tags = list(change.tags)
        session.flush()
        return aliases.model_documents(session, [row])[0]


@router.post(
    "/models/{alias}/rollback",
    summary="Take an alias's last move back",
    responses=openapi.responses(examples.MODEL, problems=(404, 409)),
)
def rollback_model(
    alias: AliasDep, services: ServicesDep, submitter: SubmitterDep
) -> schemas.Model:
    """The alias stands again for what it stood for before; 409 `nothing_to_take_back` if it never
    stood for another model."""
    with services.database.session_scope() as session:
        row = aliases.take_back(session, alias, submitter)
        return aliases.model_documents(session, [row])[0]


@router.get(
    "/models/{alias}/history",
    summary="List what an alias has stood for",
    responses=openapi.responses(examples.ALIAS_MOVES, problems=(404, 422)),
)
def list_history(
    alias: AliasDep, page: PageDep, services: ServicesDep
) -> schemas.Page[schemas.AliasMove]:
    """Newest first. The history outlives the alias and its models."""
    before = None
    if page.after is not None:
        if not page.after.isdecimal() or int(page.after) > MAX_NUMBER:
            raise unknown_cursor()
        before = int(page.after)
    with services.database.read_scope() as session:
        rows = aliases.list_moves(session, alias, before=before, limit=page.limit + 1)
        items = [aliases.move_document(row) for row in rows[: page.limit]]
    next_ = str(items[-1].number) if len(rows) > page.limit else None
    return schemas.Page[schemas.AliasMove](items=items, next=next_)


@router.get(
    "/models/{alias}/card",
    summary="Read a model's card",
    response_class=Response,
    responses=openapi.text(examples.CARD, problems=(404,), media_type=openapi.MARKDOWN),
)
def get_card(alias: AliasDep, services: ServicesDep) -> Response:
    """In Markdown, made of what is stored: data, training, figures and limits."""
    with services.database.read_scope() as session:
        [model] = aliases.model_documents(session, [aliases.get_alias(session, alias)])
        spec = repository.trained_spec(repository.get_job(session, model.job_id))
        report = repository.own_report(session, repository.find_model(session, model.checkpoint_id))
        row = datasets.find_dataset(session, model.dataset_id) if model.dataset_id else None
        [dataset] = datasets.dataset_documents(session, [row]) if row else [None]
    return Response(write_card(model, spec, dataset, report), media_type=openapi.MARKDOWN)


@router.delete(
    "/models/{alias}",
    status_code=204,
    summary="Delete an alias",
    responses=openapi.no_content(problems=(404,)),
)
def delete_model(alias: AliasDep, services: ServicesDep, submitter: SubmitterDep) -> None:
    """The model itself stays; its job can be deleted from now on."""
    with services.database.session_scope() as session:
        aliases.delete_alias(session, alias, submitter)
