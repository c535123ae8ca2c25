"""Named recipes: trainings that somebody has published or that we stand behind, as specs.

A recipe holds the keys in which it differs from the defaults; `docs/recipes.md` says where each
comes from and what was measured. Plain data: this file imports nothing of Skipline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A spec to start from.

    `dataset_image_size`: the side in pixels of the images that it is made for; `spec` leaves the
    training size out where it is the same.
    """

    name: str
    description: str
    source: str
    dataset_image_size: int
    spec: Document


def _cifar10_resnet(depth: int) -> Recipe:
    return Recipe(
        name=f"cifar10_resnet{depth}",
        description=f"ResNet-{depth} with a small stem, plain SGD, lr reduced on a plateau",
        source="published system; epochs, patience and padding are our choice",
        dataset_image_size=32,
        spec={
            "dataset": "cifar10",
            "model": {"arch": f"resnet{depth}", "stem": "small", "init": "torch"},
            "augment": ["random_crop", "horizontal_flip"],
            "epochs": 200,
            "batch_size": 256,
            "optimizer": {
                "name": "sgd",
                "lr": 0.1,
                "momentum": 0.9,
                "nesterov": False,
                "weight_decay": 1e-4,
            },
            "scheduler": {"name": "plateau", "factor": 0.1, "patience": 10},
            "precision": "fp32",
        },
    )


TINYIMAGENET_CHANNELS: Document = {
    "mean": [0.4802, 0.4481, 0.3975],
    "std": [0.2302, 0.2265, 0.2262],
}


def _tinyimagenet(name: str, description: str, source: str, model: Document) -> Recipe:
    return Recipe(
        name=name,
        description=description,
        source=source,
        dataset_image_size=64,
        spec={
            "dataset": "tinyimagenet",
            "model": model,
            "augment": [],
            "normalize": TINYIMAGENET_CHANNELS,
            "epochs": 20,
            "batch_size": 50,
            "optimizer": {"name": "adam", "lr": 1e-4},
            "scheduler": {"name": "constant"},
            "precision": "fp32",
        },
    )


def _stl10_resnet(depth: int) -> Recipe:
    return Recipe(
        name=f"stl10_resnet{depth}",
        description=f"ResNet-{depth} with ImageNet's stem at 224 px, Adam, lr reduced on a plateau",
        source="published system; the mean of the loss instead of its sum",
        dataset_image_size=96,
        spec={
            "dataset": "stl10",
            "image_size": 224,
            "model": {"arch": f"resnet{depth}", "stem": "imagenet", "init": "kaiming"},
            "augment": ["horizontal_flip"],
            "normalize": "image_std",
            "epochs": 20,
            "batch_size": 32,
            "optimizer": {"name": "adam", "lr": 1e-3},
            "scheduler": {"name": "plateau", "factor": 0.1, "patience": 10},
            "precision": "fp32",
        },
    )


def _cifar10_200(name: str, model: Document, description: str, source: str, **keys: Any) -> Recipe:
    return Recipe(
        name=name,
        description=description,
        source=source,
        dataset_image_size=32,
        spec={
            "dataset": "cifar10",
            "model": model,
            "epochs": 200,
            "batch_size": 128,
            "optimizer": {"name": "sgd", "lr": 0.1, "nesterov": True, "weight_decay": 5e-4},
            "scheduler": {"name": "cosine"},
            **keys,
        },
    )


def _cifar10_fast(percent: int, epochs: int, augment: list[Any]) -> Recipe:
    return Recipe(
        name=f"cifar10_resnet18_fast{percent}",
        description=f"ResNet-18 to {percent} % in {epochs} epochs: one cycle, label smoothing",
        source="ours, after the public speed runs on CIFAR-10",
        dataset_image_size=32,
        spec={
            "dataset": "cifar10",
            "model": {"arch": "resnet18", "stem": "small"},
            "augment": augment,
            "epochs": epochs,
            "batch_size": 512,
            "optimizer": {
                "name": "sgd",
                "lr": 0.4,
                "nesterov": True,
                "weight_decay": 5e-4,
                "decay_norm_and_bias": False,
            },
            "scheduler": {
                "name": "one_cycle",
                "pct_start": 0.25,
                "div_factor": 10,
                "final_div_factor": 1000,
                "anneal": "linear",
            },
            "loss": {"label_smoothing": 0.1},
            "checkpoint": {"monitor": "val_top1", "every_epochs": epochs},
        },
    )


def _tinyimagenet_modern(suffix: str, top1: str, *mixing: Document) -> Recipe:
    how = f" with {mixing[0]['name']}" if mixing else ""
    return Recipe(
        name=f"tinyimagenet_resnet18_modern{suffix}",
        description=f"ResNet-18 with a small stem, 400 epochs{how}; {top1} % expected",
        source="ours, after openmixup's settings for TinyImageNet",
        dataset_image_size=64,
        spec={
            "dataset": "tinyimagenet",
            "model": {"arch": "resnet18", "stem": "small"},
            "augment": [{"name": "random_crop", "padding": 4}, "horizontal_flip", *mixing],
            "epochs": 400,
            "batch_size": 100,
            "optimizer": {"name": "sgd", "lr": 0.2, "nesterov": True, "weight_decay": 1e-4},
            "scheduler": {"name": "cosine"},
            "checkpoint": {"monitor": "val_top1"},
        },
    )


_CUTOUT_PAPER = "DeVries & Taylor, 2017, with a cosine schedule"
_SMALL_RESNET18: Document = {"arch": "resnet18", "stem": "small"}

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _cifar10_resnet(18),
        _cifar10_resnet(34),
        _tinyimagenet(
            "tinyimagenet_resnet50",
            "A bottleneck ResNet after ResNet-50 for 64 px, three linear layers, Adam",
            "published network; loop and initialisation are our choice",
            {"arch": "resnet50_64px", "init": "kaiming"},
        ),
        _tinyimagenet(
            "tinyimagenet_vgg",
            "Ten convolutions without batch norm, dropout after each stage, Adam",
            "published system",
            {"arch": "vgg10_64px", "dropout": 0.4, "init": "torch"},
        ),
        *(_stl10_resnet(depth) for depth in (18, 34, 50, 101, 152)),
        _cifar10_200(
            "cifar10_resnet18_200",
            _SMALL_RESNET18,
            "ResNet-18, 200 epochs of Nesterov SGD with crops and flips; 95.3 % expected",
            _CUTOUT_PAPER,
        ),
        _cifar10_200(
            "cifar10_resnet18_200_cutout",
            _SMALL_RESNET18,
            "The same with cutout of 16 px; 96.0 % expected",
            _CUTOUT_PAPER,
            augment=["random_crop", "horizontal_flip", {"name": "cutout", "size": 16}],
        ),
        _cifar10_fast(94, 14, ["random_crop", "horizontal_flip"]),
        _cifar10_fast(95, 28, ["random_crop", "horizontal_flip", {"name": "cutout", "size": 8}]),
        _cifar10_200(
            "cifar10_vgg16_bn_200",
            {"arch": "vgg16_bn"},
            "VGG-16 with batch norm, 200 epochs; 94.0 % expected",
            "huyvnphan/PyTorch_CIFAR10 for the figure; the schedule is ours",
        ),
        _tinyimagenet_modern("", "61.7"),
        _tinyimagenet_modern("_mixup", "63.9", {"name": "mixup", "alpha": 0.2}),
        _tinyimagenet_modern("_cutmix", "65.5", {"name": "cutmix", "alpha": 1.0}),
        Recipe(
            name="stl10_resnet18_modern",
            description="ResNet-18 with a small stem at 96 px on the labelled images alone; 80 % "
            "to 84 % expected",
            source="ours",
            dataset_image_size=96,
            spec={
                "dataset": "stl10",
                "model": _SMALL_RESNET18,
                "augment": [
                    "random_resized_crop",
                    "horizontal_flip",
                    "trivial_augment",
                    {"name": "cutout", "size": 32},
                ],
                "epochs": 300,
                "batch_size": 128,
                "optimizer": {
                    "name": "sgd",
                    "lr": 0.1,
                    "nesterov": True,
                    "weight_decay": 5e-4,
                    "decay_norm_and_bias": False,
                },
                "scheduler": {"name": "cosine", "warmup_epochs": 5},
                "loss": {"label_smoothing": 0.1},
                "ema_decay": 0.995,
                "checkpoint": {"monitor": "val_top1"},
            },
        ),
    )
}

_NAMED_PARTS = ("optimizer", "scheduler", "loss")
"""Parts that a name chooses: those of another name take nothing from the recipe."""


def expand(document: Any) -> Any:
    """The document with what its recipe says, where it says nothing itself.

    Objects are merged key by key, lists replaced as a whole; an optimizer or scheduler of another
    name than the recipe's replaces it. What is no object, or names no known recipe, is returned as
    it is: its faults are for the spec's own checks to find.
    """
    name = document.get("recipe") if isinstance(document, Mapping) else None
    recipe = RECIPES.get(name) if isinstance(name, str) else None
    if recipe is None:
        return document
    # The size is filled in by `catalog.resolve`, which knows whether the dataset fits.
    filled = {key: value for key, value in recipe.spec.items() if key != "image_size"}
    return _merge(filled, document)


def _merge(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> Document:
    merged = dict(recipe)
    for key, value in given.items():
        ours = recipe.get(key)
        is_other = key in _NAMED_PARTS and isinstance(value, Mapping) and "name" in value
        if isinstance(ours, Mapping) and isinstance(value, Mapping):
            merged[key] = (
                value
                if is_other and value["name"] != ours.get("name", value["name"])
                else {
                    **ours,
                    **value,
                }
            )
        else:
            merged[key] = value
    return merged
