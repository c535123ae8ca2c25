"""What every route can ask for: the process's services, ids, and the page of a list.

Also the one check of access, which `api.app` puts on the whole app. Sessions come from
`Database`'s scopes, entered in the routes; queries are the repository's.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from fastapi import Depends, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.checks import Checks
from api.drawing import Drawing
from api.exporting import Exporter
from api.limits import QueueLimits
from api.metering import Metering
from api.references import is_id
from api.serving.images import Decoder
from api.serving.inference import Inference
from api.stored_datasets import StoredDatasets
from api.stored_models import StoredModels
from api.streams import StreamHub
from shared.database import Database
from shared.dispatch import Bell
from shared.errors import DatasetNotFound, InvalidInput, JobNotFound, Unauthorized
from shared.settings import Settings
from shared.storage import Storage

ItemT = TypeVar("ItemT")

OPEN_PATHS = ("/healthz", "/readyz")
"""What anybody may ask: an orchestrator's probes carry no key."""
DEFAULT_PAGE = 50
SUBMITTER_LENGTH = 16


@dataclass(frozen=True)
class Services:
    """What lives as long as the process."""

    settings: Settings
    database: Database
    storage: Storage
    bell: Bell
    limits: QueueLimits
    streams: StreamHub
    inference: Inference
    models: StoredModels
    decoder: Decoder
    checks: Checks
    metering: Metering
    drawing: Drawing
    stored_datasets: StoredDatasets
    exporter: Exporter


# The dependencies below are `async` only because plain functions would each take a trip through
# the thread pool; none of them waits for anything.


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]

bearer = HTTPBearer(
    auto_error=False, description="The key that the server was given as SKIPLINE_API_KEY"
)


async def require_key(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> None:
    """Lets nobody in without the server's key, if it has one. Raises `Unauthorized`."""
    settings: Settings = request.app.state.settings
    if settings.api_key is None or request.scope["route"].path in OPEN_PATHS:
        return
    given = credentials.credentials.encode() if credentials else b""
    if not hmac.compare_digest(given, settings.api_key.get_secret_value().encode()):
        raise Unauthorized("Send the header Authorization: Bearer with this server's key")


async def _submitter(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> str:
    settings: Settings = request.app.state.settings
    if settings.api_key is None or credentials is None:
        return ""
    return hashlib.sha256(credentials.credentials.encode()).hexdigest()[:SUBMITTER_LENGTH]


SubmitterDep = Annotated[str, Depends(_submitter)]
"""Whose request it is: a digest of its key, empty where the server asks for none."""


async def _job_id(job_id: str) -> str:
    if not is_id(job_id):
        raise JobNotFound("There is no job of this id")
    return job_id


JobId = Annotated[str, Depends(_job_id)]
"""The `job_id` of the path."""


@dataclass(frozen=True)
class JudgedBy:
    """The images that a client wants models judged by: None for those that they were trained for,
    and of these the split `test`, else `val`."""

    dataset: str | None
    split: str | None


async def _judged_by(
    dataset: Annotated[
        str | None, Query(description="To judge by; what the model was trained on by default")
    ] = None,
    split: Annotated[
        Literal["train", "val", "test"] | None, Query(description="test by default, else val")
    ] = None,
) -> JudgedBy:
    if dataset is not None and not dataset.isprintable():
        raise DatasetNotFound("There is no stored dataset of this id, label or name")
    return JudgedBy(dataset, split)


JudgedByDep = Annotated[JudgedBy, Depends(_judged_by)]
"""What the query asks for."""


def unknown_cursor() -> InvalidInput:
    """What is raised for a cursor that this service never gave out."""
    message = "Take `next` of the page before"
    return InvalidInput("The cursor is unknown", errors=[{"loc": "after", "message": message}])


@dataclass(frozen=True)
class PageRequest:
    """Which part of a list is asked for."""

    limit: int
    after: str | None

    def cut(
        self, items: list[ItemT], cursor: Callable[[ItemT], str]
    ) -> tuple[list[ItemT], str | None]:
        """This page of a list that is short enough to be at hand, and the next one's cursor.
        Raises `InvalidInput` for a cursor that is none of the list's."""
        cursors = [cursor(item) for item in items]
        if self.after is not None and self.after not in cursors:
            raise unknown_cursor()
        first = 0 if self.after is None else cursors.index(self.after) + 1
        beyond = first + self.limit
        return items[first:beyond], cursors[beyond - 1] if beyond < len(items) else None


async def _page(
    request: Request,
    limit: Annotated[int, Query(ge=1, description="Items of one page")] = DEFAULT_PAGE,
    after: Annotated[str | None, Query(description="`next` of the page before")] = None,
) -> PageRequest:
    settings: Settings = request.app.state.settings
    if limit > settings.max_list_items:
        message = f"Should be at most {settings.max_list_items}"
        raise InvalidInput("The page is too long", errors=[{"loc": "limit", "message": message}])
    if after is not None and not is_id(after):
        raise unknown_cursor()
    return PageRequest(limit, after)


PageDep = Annotated[PageRequest, Depends(_page)]
