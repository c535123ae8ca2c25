"""What a spec may hold, and how an error names its key."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from skipline.specs import (
    Adam,
    TrainSpec,
    dump_spec,
    error_items,
    load_spec,
    parse_request,
)


def locs(document: Any) -> list[str]:
    with pytest.raises(ValidationError) as refused:
        parse_request(document)
    return [item["loc"] for item in error_items(refused.value)]


def test_the_defaults_are_those_of_the_contract() -> None:
    spec = dump_spec(parse_request({"dataset": "cifar10"}))
    assert (spec["epochs"], spec["batch_size"], spec["log_every_steps"]) == (20, 256, 50)
    assert spec["augment"] == ["random_crop", "horizontal_flip"]
    assert spec["optimizer"] == {
        "name": "sgd",
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.0005,
        "decay_norm_and_bias": True,
    }
    assert spec["scheduler"] == {"name": "cosine", "warmup_epochs": 1, "min_lr": 0}
    assert spec["checkpoint"] == {
        "keep_best": 1,
        "keep_last": 1,
        "keep_every_epochs": None,
        "every_epochs": 1,
        "every_minutes": 10,
        "monitor": "val_loss",
        "mode": "min",
    }


def test_a_dumped_spec_is_json_and_reads_back_as_itself() -> None:
    spec = parse_request({"dataset": "d", "optimizer": {"name": "adam"}, "tags": ["x"]})
    assert load_spec(json.loads(json.dumps(dump_spec(spec)))) == spec


def test_a_variant_is_chosen_by_its_name() -> None:
    spec = parse_request({"dataset": "d", "optimizer": {"name": "adam", "beta1": 0.8}})
    assert isinstance(spec, TrainSpec)
    assert isinstance(spec.optimizer, Adam)
    assert spec.optimizer.beta1 == 0.8


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({}, ["dataset"]),
        ([], [""]),
        ({"kind": "sing"}, ["kind"]),
        ({"dataset": "d", "epoch": 3}, ["epoch"]),
        ({"dataset": "d", "epochs": 0}, ["epochs"]),
        ({"dataset": "d", "epochs": 10**9}, ["epochs"]),
        ({"dataset": "d", "batch_size": -1}, ["batch_size"]),
        ({"dataset": "d", "optimizer": {"lr": 0}}, ["optimizer.lr"]),
        ({"dataset": "d", "optimizer": {"lr": float("nan")}}, ["optimizer.lr"]),
        ({"dataset": "d", "optimizer": {"lr": float("inf")}}, ["optimizer.lr"]),
        ({"dataset": "d", "optimizer": {"name": "sgdd"}}, ["optimizer.name"]),
        ({"dataset": "d", "optimizer": {"name": "adam", "momentum": 1}}, ["optimizer.momentum"]),
        ({"dataset": "d", "scheduler": {"name": "step", "patience": 1}}, ["scheduler.patience"]),
        ({"dataset": "d", "model": {"arch": "resnet19"}}, ["model.arch"]),
        ({"dataset": "d", "name": "a\0b"}, ["name"]),
        ({"dataset": "d", "name": "x" * 300}, ["name"]),
        ({"dataset": "d", "augment": ["magic"]}, ["augment.0.name"]),
        ({"kind": "evaluate", "dataset": "d"}, ["model"]),
        ({"kind": "evaluate", "dataset": "d", "model": "m", "split": "all"}, ["split"]),
    ],
)
def test_bad_input_is_named_by_its_full_key(document: Any, expected: list[str]) -> None:
    assert locs(document) == expected


def test_the_mode_of_a_monitor_follows_from_it() -> None:
    spec = parse_request({"dataset": "d", "checkpoint": {"monitor": "val_top1"}})
    assert isinstance(spec, TrainSpec)
    assert spec.checkpoint.mode == "max"
    wrong = {"monitor": "val_top1", "mode": "min"}
    assert locs({"dataset": "d", "checkpoint": wrong}) == ["checkpoint"]


def test_a_spec_cannot_be_changed() -> None:
    spec = parse_request({"dataset": "d"})
    with pytest.raises(ValidationError):
        spec.dataset = "e"  # type: ignore[misc]
