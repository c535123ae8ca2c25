"""What a recipe fills in, and what wins over it."""

from __future__ import annotations

from typing import Any

import pytest

from skipline.catalog import BUILTIN_DATASETS, DatasetFacts, SpecRefused, resolve
from skipline.recipes import RECIPES, expand
from skipline.specs import SGD, Adam, Cosine, TrainSpec, dump_spec, parse_request


def train_spec(**keys: Any) -> TrainSpec:
    spec = parse_request(keys)
    assert isinstance(spec, TrainSpec)
    return spec


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_works_on_its_own_dataset(name: str) -> None:
    recipe = RECIPES[name]
    dataset = BUILTIN_DATASETS[recipe.spec["dataset"]]
    assert dataset.image_size == recipe.dataset_image_size
    spec = resolve(train_spec(recipe=name), dataset)
    assert spec.recipe == name
    assert spec.image_size == recipe.spec.get("image_size", dataset.image_size)
    # What was stored is the same training when it is posted again.
    assert parse_request(dump_spec(spec)) == spec


def test_the_published_systems_are_as_they_were_published() -> None:
    cifar = train_spec(recipe="cifar10_resnet34")
    assert cifar.optimizer == SGD(lr=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4)
    assert (cifar.model.arch, cifar.batch_size, cifar.scheduler.name) == (
        "resnet34",
        256,
        "plateau",
    )
    vgg = train_spec(recipe="tinyimagenet_vgg")
    assert vgg.optimizer == Adam(lr=1e-4)
    assert (vgg.batch_size, vgg.epochs, vgg.augment, vgg.model.dropout) == (50, 20, (), 0.4)
    assert dump_spec(vgg)["normalize"] == {
        "mean": [0.4802, 0.4481, 0.3975],
        "std": [0.2302, 0.2265, 0.2262],
    }
    stl = train_spec(recipe="stl10_resnet50")
    assert stl.optimizer == Adam(lr=1e-3)
    assert (stl.batch_size, stl.epochs, stl.normalize) == (32, 20, "image_std")
    assert dump_spec(stl)["augment"] == ["horizontal_flip"]


@pytest.mark.parametrize(
    "name", ["cifar10_resnet18", "tinyimagenet_resnet50", "tinyimagenet_vgg", "stl10_resnet152"]
)
def test_modern_training_is_off_in_the_published_recipes(name: str) -> None:
    spec = train_spec(recipe=name)
    assert spec.precision == "fp32"
    assert spec.loss.label_smoothing == 0
    assert spec.ema_decay is None
    assert spec.gradient_clip_norm is None
    assert spec.optimizer.decay_norm_and_bias
    assert {item.name for item in spec.augment} <= {"random_crop", "horizontal_flip"}


def test_what_is_given_beside_a_recipe_wins() -> None:
    spec = train_spec(
        recipe="cifar10_resnet18",
        dataset="mine",
        epochs=3,
        model={"arch": "resnet50"},
        optimizer={"lr": 0.5},
        augment=[],
    )
    assert (spec.dataset, spec.epochs, spec.augment) == ("mine", 3, ())
    assert (spec.model.arch, spec.model.stem) == ("resnet50", "small")
    assert spec.optimizer == SGD(lr=0.5, nesterov=False, weight_decay=1e-4)


def test_another_optimizer_or_schedule_takes_nothing_from_the_recipes() -> None:
    spec = train_spec(
        recipe="cifar10_resnet18", optimizer={"name": "adam"}, scheduler={"name": "cosine"}
    )
    assert spec.optimizer == Adam()
    assert spec.scheduler == Cosine()


def test_a_part_without_its_name_keeps_what_the_recipe_says() -> None:
    spec = train_spec(recipe="cifar10_resnet18_fast94", loss={"name": "cross_entropy"})
    assert spec.loss.label_smoothing == 0.1


def test_a_warm_up_that_is_asked_for_is_not_shortened() -> None:
    spec = train_spec(
        recipe="cifar10_resnet18_200", epochs=2, scheduler={"name": "cosine", "warmup_epochs": 3}
    )
    with pytest.raises(SpecRefused) as refused:
        resolve(spec, BUILTIN_DATASETS["cifar10"])
    assert [item["loc"] for item in refused.value.items] == ["scheduler.warmup_epochs"]


def test_what_names_no_recipe_is_left_as_it_is() -> None:
    for document in ({"dataset": "digits"}, {"recipe": "unheard of"}, {"recipe": [1]}, [], None):
        assert expand(document) is document


def test_a_recipe_is_refused_on_images_of_another_size_unless_one_is_set() -> None:
    photos = DatasetFacts("photos", ("cat", "dog"), 224, {"train": 100, "val": 10})
    with pytest.raises(SpecRefused, match="made for images of 32 px") as refused:
        resolve(train_spec(recipe="cifar10_resnet18", dataset="photos"), photos)
    assert [item["loc"] for item in refused.value.items] == ["recipe"]
    meant = train_spec(recipe="cifar10_resnet18", dataset="photos", image_size=64)
    assert resolve(meant, photos).image_size == 64


def test_a_short_run_of_a_recipe_has_no_warm_up() -> None:
    spec = train_spec(recipe="stl10_resnet18_modern", epochs=2)
    assert resolve(spec, BUILTIN_DATASETS["stl10"]).scheduler == Cosine(warmup_epochs=0)
