from __future__ import annotations

from typing import Any

from skipline.recipes import RECIPES


def test_the_recipes_are_those_that_a_job_may_name(sqlite_api: Any) -> None:
    page = sqlite_api.get("/recipes").json()
    assert [recipe["name"] for recipe in page["items"]] == list(RECIPES)
    assert page["next"] is None
    first = page["items"][0]
    assert (first["name"], first["dataset"]) == ("cifar10_resnet18", "cifar10")
    assert first["spec"]["optimizer"]["weight_decay"] == 1e-4


def test_pages_of_recipes_do_not_overlap(sqlite_api: Any) -> None:
    first = sqlite_api.get("/recipes", params={"limit": 2}).json()
    assert first["next"] == "cifar10_resnet34"
    rest = sqlite_api.get("/recipes", params={"after": first["next"]}).json()
    names = [recipe["name"] for recipe in first["items"] + rest["items"]]
    assert names == list(RECIPES)
