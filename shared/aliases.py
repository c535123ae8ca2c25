"""Names under which models are served: what each stands for, and what it stood for before.

Every query about them, within the caller's transaction. What an alias stands for, now or before
its last move, is kept as long as that is so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared import repository
from shared.database import db_now
from shared.errors import AliasNotFound, NothingToTakeBack
from shared.tables import Alias, AliasMove, Checkpoint, Job
from skipline import schemas


def get_alias(session: Session, name: str, *, lock: bool = False) -> Alias:
    """The alias; `lock` keeps others from moving it meanwhile. Raises `AliasNotFound`."""
    query = select(Alias).where(Alias.name == name)
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise AliasNotFound(f"There is no alias {name[:64]}. PUT /models/{{alias}} makes one")
    return row


def move_alias(
    session: Session,
    name: str,
    reference: str,
    submitter: str,
    check: Callable[[Checkpoint], None] = lambda checkpoint: None,
) -> Alias:
    """Lets the alias, which is made if need be, stand for a model (a checkpoint's id, a job's, or
    another alias). Nothing changes where it does so already. `check` is shown the checkpoint while
    nobody else can move the alias, and raises what is against it.

    Raises:
        ModelNotFound, NoCheckpointYet: as `repository.find_model`.
        IntegrityError: it was made by another transaction at this moment; try again.
    """
    # The checkpoint before the alias: whoever deletes a job locks in this order, too.
    checkpoint = repository.pin_model(session, reference)
    row = session.scalar(select(Alias).where(Alias.name == name).with_for_update())
    check(checkpoint)
    if row is not None and row.checkpoint_id == checkpoint.id:
        return row
    move = _record(session, name, checkpoint, submitter)
    if row is None:
        row = Alias(name=name, former_id=None, notes="", tags=[])
        session.add(row)
    else:
        row.former_id = row.checkpoint_id
    _point(row, checkpoint, move)
    session.flush()
    return row


def take_back(session: Session, name: str, submitter: str) -> Alias:
    """Lets the alias stand for what it stood for before its last move; doing so twice changes
    nothing in the end.

    Raises:
        AliasNotFound: there is no such alias.
        NothingToTakeBack: it never stood for another model.
    """
    row = get_alias(session, name, lock=True)
    former = session.get(Checkpoint, row.former_id) if row.former_id else None
    if former is None:
        raise NothingToTakeBack(f"{name} has never stood for another model: move it instead")
    row.former_id = row.checkpoint_id
    _point(row, former, _record(session, name, former, submitter))
    session.flush()
    return row


def delete_alias(session: Session, name: str, submitter: str) -> None:
    """Its history stays, and goes on if it is made again. Raises `AliasNotFound`."""
    row = get_alias(session, name, lock=True)
    _record(session, name, None, submitter)
    session.delete(row)
    session.flush()


def _point(row: Alias, checkpoint: Checkpoint, move: AliasMove) -> None:
    row.checkpoint_id, row.number, row.moved_at = checkpoint.id, move.number, move.created_at


def _record(
    session: Session, name: str, checkpoint: Checkpoint | None, submitter: str
) -> AliasMove:
    newest = select(func.max(AliasMove.number)).where(AliasMove.name == name)
    move = AliasMove(
        name=name,
        number=(session.scalar(newest) or 0) + 1,
        checkpoint_id=checkpoint.id if checkpoint else None,
        job_id=checkpoint.job_id if checkpoint else None,
        submitter=submitter,
        created_at=session.scalars(select(db_now())).one(),
    )
    session.add(move)
    return move


def list_aliases(session: Session) -> list[Alias]:
    """All of them, by name."""
    return list(session.scalars(select(Alias).order_by(Alias.name)))


def list_moves(
    session: Session, name: str, *, before: int | None, limit: int
) -> Sequence[AliasMove]:
    """The moves of an alias that is there or was, the newest first; those numbered below `before`.
    Raises `AliasNotFound` for one that never was."""
    query = select(AliasMove).where(AliasMove.name == name).order_by(AliasMove.number.desc())
    if before is not None:
        query = query.where(AliasMove.number < before)
    rows = session.scalars(query.limit(limit)).all()
    if not rows and before is None:
        raise AliasNotFound(f"There never was an alias {name[:64]}")
    return rows


def model_documents(session: Session, rows: Sequence[Alias]) -> list[schemas.Model]:
    """The aliases as clients see them."""
    query = (
        select(Alias.name, Checkpoint, Job)
        .join(Checkpoint, Checkpoint.id == Alias.checkpoint_id)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(Alias.name.in_([row.name for row in rows]))
    )
    found = {name: (checkpoint, job) for name, checkpoint, job in session.execute(query)}
    return [_document(row, *found[row.name]) for row in rows]


def _document(row: Alias, checkpoint: Checkpoint, job: Job) -> schemas.Model:
    spec = repository.trained_spec(job)
    return schemas.Model(
        alias=row.name,
        checkpoint_id=checkpoint.id,
        former_checkpoint_id=row.former_id,
        job_id=job.id,
        arch=spec.model.arch,
        dataset=spec.dataset,
        dataset_id=job.dataset_id,
        epoch=checkpoint.epoch,
        step=checkpoint.step,
        metrics=checkpoint.metrics,
        num_bytes=checkpoint.num_bytes,
        notes=row.notes,
        tags=row.tags,
        number=row.number,
        moved_at=row.moved_at,
    )


def move_document(row: AliasMove) -> schemas.AliasMove:
    """The line of the history as clients see it."""
    return schemas.AliasMove(
        number=row.number,
        checkpoint_id=row.checkpoint_id,
        job_id=row.job_id,
        submitter=row.submitter,
        created_at=row.created_at,
    )
