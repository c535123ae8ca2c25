"""`GET /architectures`: the networks that can be asked for."""

from __future__ import annotations

from fastapi import APIRouter

from api import examples, openapi
from api.dependencies import PageDep
from skipline import schemas
from skipline.catalog import ARCHITECTURES

router = APIRouter(tags=["architectures"])


@router.get(
    "/architectures",
    summary="List the networks",
    responses=openapi.responses(examples.ARCHITECTURES, problems=(422,)),
)
async def list_architectures(page: PageDep) -> schemas.Page[schemas.Architecture]:
    """Each with the smallest images that it can take, by stem."""
    items = [
        schemas.Architecture(
            name=facts.name,
            family=facts.family,
            depth=facts.depth,
            batch_norm=facts.batch_norm,
            min_image_size={str(stem): size for stem, size in facts.min_image_size.items()},
            description=facts.description,
        )
        for facts in ARCHITECTURES.values()
    ]
    items, next_ = page.cut(items, lambda architecture: architecture.name)
    return schemas.Page[schemas.Architecture](items=items, next=next_)
