"""`GET /recipes`: named trainings to start from."""

from __future__ import annotations

from fastapi import APIRouter

from api import examples, openapi
from api.dependencies import PageDep
from skipline import schemas
from skipline.recipes import RECIPES

router = APIRouter(tags=["recipes"])


@router.get(
    "/recipes",
    summary="List the recipes",
    responses=openapi.responses(examples.RECIPES, problems=(422,)),
)
async def list_recipes(page: PageDep) -> schemas.Page[schemas.Recipe]:
    """Each with the keys of a training's spec that it sets. `POST /jobs` takes one by its name."""
    items = [
        schemas.Recipe(
            name=recipe.name,
            description=recipe.description,
            source=recipe.source,
            dataset=recipe.spec["dataset"],
            spec=recipe.spec,
        )
        for recipe in RECIPES.values()
    ]
    items, next_ = page.cut(items, lambda recipe: recipe.name)
    return schemas.Page[schemas.Recipe](items=items, next=next_)
