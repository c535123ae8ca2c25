"""What a spec becomes when the dataset is known, and what cannot work."""

from __future__ import annotations

from typing import Any

import pytest

from skipline.catalog import (
    ARCHITECTURES,
    BUILTIN_DATASETS,
    ClusterFacts,
    DatasetFacts,
    SpecRefused,
    default_image_size,
    resolve,
    resolve_evaluation,
    resolve_stem,
    selection_split,
)
from skipline.specs import ARCHS, EvaluateSpec, Step, TrainSpec, dump_spec, parse_request

DIGITS = BUILTIN_DATASETS["digits"]


def facts(
    *splits: str, classes: tuple[str, ...] = ("a", "b"), image_size: int = 32
) -> DatasetFacts:
    return DatasetFacts("own", classes, image_size, dict.fromkeys(splits, 100))


def resolved(dataset: DatasetFacts = DIGITS, **keys: Any) -> TrainSpec:
    spec = parse_request({"dataset": dataset.name, **keys})
    assert isinstance(spec, TrainSpec)
    return resolve(spec, dataset)


def refused_keys(dataset: DatasetFacts = DIGITS, **keys: Any) -> list[str]:
    with pytest.raises(SpecRefused) as refused:
        resolved(dataset, **keys)
    return [item["loc"] for item in refused.value.items]


def test_every_architecture_that_a_spec_may_name_is_in_the_catalog() -> None:
    assert set(ARCHITECTURES) == set(ARCHS)


@pytest.mark.parametrize(
    ("median", "size"), [(1, 32), (8, 32), (32, 32), (33, 64), (96, 96), (200, 224), (3000, 224)]
)
def test_the_image_size_is_the_median_rounded_up(median: int, size: int) -> None:
    assert default_image_size(median) == size


def test_the_image_size_comes_from_the_dataset_unless_given() -> None:
    assert resolved().image_size == 32
    assert resolved(image_size=64).image_size == 64


@pytest.mark.parametrize(("size", "stem"), [(8, "small"), (64, "small"), (65, "imagenet")])
def test_images_up_to_64_pixels_keep_their_resolution_in_the_stem(size: int, stem: str) -> None:
    assert resolve_stem("auto", size) == stem
    assert resolve_stem("imagenet", size) == "imagenet"


def test_a_step_schedule_falls_at_half_and_three_quarters() -> None:
    scheduler = resolved(epochs=20, scheduler={"name": "step"}).scheduler
    assert isinstance(scheduler, Step)
    assert scheduler.milestones == (10, 15)


def test_a_run_too_short_for_the_default_warmup_has_none() -> None:
    assert resolved(epochs=1).scheduler.warmup_epochs == 0
    assert resolved(epochs=2).scheduler.warmup_epochs == 1


@pytest.mark.parametrize(
    ("keys", "loc"),
    [
        ({"model": {"arch": "vgg16"}, "image_size": 16}, "image_size"),
        ({"model": {"arch": "resnet18", "stem": "imagenet"}, "image_size": 16}, "image_size"),
        ({"model": {"arch": "vgg16", "stem": "small"}}, "model.stem"),
        ({"epochs": 3, "scheduler": {"warmup_epochs": 3}}, "scheduler.warmup_epochs"),
        ({"scheduler": {"name": "step", "milestones": [5, 5]}}, "scheduler.milestones"),
        ({"augment": ["random_crop", "random_crop"]}, "augment"),
        ({"augment": ["random_crop", "random_resized_crop"]}, "augment"),
        ({"augment": ["rand_augment", "trivial_augment"]}, "augment"),
        ({"augment": ["horizontal_flip", {"name": "cutout", "size": 33}]}, "augment.1.size"),
        ({"augment": [{"name": "random_crop", "padding": 33}]}, "augment.0.padding"),
        ({"val_fraction": 0.0001}, "val_fraction"),
        ({"model": {"arch": "vgg10_64px", "stem": "small"}}, "model.stem"),
        ({"model": {"arch": "vgg11", "stochastic_depth": 0.1}}, "model.stochastic_depth"),
        ({"model": {"arch": "vgg10_64px", "init_from": "imagenet"}}, "model.init_from"),
        ({"model": {"arch": "resnet18", "init_from": "imagenet"}}, "model.init_from"),
        ({"model": {"freeze": ["layer5"]}}, "model.freeze"),
        ({"model": {"arch": "vgg11", "freeze": ["features", "classifier"]}}, "model.freeze"),
        ({"precision": "fp16", "resources": {"device": "cpu"}}, "precision"),
        ({"precision": "tf32", "resources": {"device": "cpu"}}, "precision"),
        ({"batch_size": 100, "accumulate_steps": 3}, "accumulate_steps"),
        ({"batch_size": 9, "resources": {"num_processes": 2}}, "resources.num_processes"),
        ({"batch_size": 6, "accumulate_steps": 2, "augment": ["mixup"]}, "accumulate_steps"),
        ({"batch_size": 1, "augment": ["cutmix"]}, "batch_size"),
    ],
)
def test_what_cannot_work_is_refused_with_its_key(keys: dict[str, Any], loc: str) -> None:
    assert refused_keys(**keys) == [loc]


def refused_in(cluster: ClusterFacts | None, **keys: Any) -> list[str]:
    spec = parse_request({"dataset": "digits", **keys})
    assert isinstance(spec, TrainSpec)
    try:
        resolve(spec, DIGITS, cluster)
    except SpecRefused as refused:
        return [item["loc"] for item in refused.items]
    return []


@pytest.mark.parametrize(
    ("max_gpus", "num_processes", "refused"),
    [
        (0, 1, ["resources.num_processes"]),
        (1, 1, []),
        (1, 2, ["resources.num_processes"]),
        (2, 2, []),
    ],
)
def test_more_processes_than_any_worker_has_gpus_are_refused(
    max_gpus: int, num_processes: int, refused: list[str]
) -> None:
    resources = {"device": "cuda", "num_processes": num_processes}
    assert refused_in(ClusterFacts(max_gpus), resources=resources) == refused
    assert refused_in(None, resources=resources) == []


def test_a_gpus_precision_is_refused_where_no_worker_has_one() -> None:
    assert refused_in(ClusterFacts(max_gpus=0), precision="fp16") == ["precision"]
    assert refused_in(ClusterFacts(max_gpus=1), precision="fp16") == []
    assert refused_in(None, precision="fp16") == []


def test_a_gpus_precision_wants_as_many_gpus_as_processes() -> None:
    keys: dict[str, Any] = {"precision": "fp16", "resources": {"num_processes": 2}}
    assert refused_in(ClusterFacts(max_gpus=1), **keys) == ["resources.num_processes"]
    assert refused_in(ClusterFacts(max_gpus=2), **keys) == []


def test_an_evaluation_in_several_processes_is_refused() -> None:
    spec = EvaluateSpec.model_validate(
        {"model": "m", "dataset": "own", "resources": {"num_processes": 2}}
    )
    with pytest.raises(SpecRefused) as refused:
        resolve_evaluation(spec, facts("test"), ("a", "b"))
    assert [item["loc"] for item in refused.value.items] == ["resources.num_processes"]


def test_sizes_that_depend_on_the_image_are_written_out() -> None:
    augment = dump_spec(resolved(augment=["random_crop", "cutout"]))["augment"]
    assert augment == ["random_crop", {"name": "cutout", "size": 16}]


def test_a_dataset_that_cannot_be_trained_on_is_refused() -> None:
    assert refused_keys(facts("train", "val", classes=("a",))) == ["dataset"]
    assert refused_keys(facts("val")) == ["dataset"]
    assert refused_keys(facts("train")) == ["val_fraction"]


def test_val_selects_the_best_else_test_does() -> None:
    spec = resolved()
    assert selection_split(spec, ("train", "val", "test")) == "val"
    assert selection_split(spec, ("train", "test")) == "test"
    assert selection_split(resolved(val_fraction=0.1), ("train", "test")) == "val"


def test_an_evaluation_takes_test_else_val() -> None:
    spec = EvaluateSpec(model="m", dataset="own")
    assert resolve_evaluation(spec, facts("train", "val", "test"), ("a", "b")).split == "test"
    assert resolve_evaluation(spec, facts("train", "val"), ("a", "b")).split == "val"


def test_an_evaluation_on_other_classes_names_the_difference() -> None:
    with pytest.raises(SpecRefused, match="differ in: c"):
        resolve_evaluation(EvaluateSpec(model="m", dataset="own"), facts("test"), ("a", "b", "c"))
    missing = EvaluateSpec(model="m", dataset="own", split="val")
    with pytest.raises(SpecRefused, match="No split val"):
        resolve_evaluation(missing, facts("test"), ("a", "b"))
