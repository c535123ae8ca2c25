"""Facts that need neither torch nor a database: architectures, built-in datasets, and what fits
together. `resolve` writes every default of a spec out and refuses what cannot work."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Literal

from skipline.specs import ARCHS, RESNETS, EvaluateSpec, Step, TrainSpec

Split = Literal["train", "val", "test"]
Stem = Literal["small", "imagenet"]

CROP_PADDING_SHARE = 8
"""A random crop pads by image_size // 8 pixels on each side: 4 at 32 px, as in He et al. 2016."""
MAX_SMALL_STEM_SIZE = 64
"""Up to this many pixels `stem: auto` keeps the resolution of the input."""


class SpecRefused(ValueError):
    """A spec that is well formed and cannot work; `items` name the keys."""

    def __init__(self, items: list[dict[str, str]], code: str = "invalid_spec") -> None:
        super().__init__("; ".join(f"{item['loc']}: {item['message']}" for item in items))
        self.items = items
        self.code = code


@dataclass(frozen=True)
class ArchitectureFacts:
    """What can be said of a network without building it.

    `min_image_size` maps each stem to the smallest side in pixels that leaves a map of 1x1.
    """

    name: str
    family: Literal["resnet", "vgg"]
    depth: int
    batch_norm: bool
    min_image_size: Mapping[Stem, int]
    description: str


def _resnet(name: str) -> ArchitectureFacts:
    depth = int(name.removeprefix("resnet"))
    block = "basic" if depth < 50 else "bottleneck"
    return ArchitectureFacts(
        name=name,
        family="resnet",
        depth=depth,
        batch_norm=True,
        min_image_size={"small": 8, "imagenet": 32},
        description=f"ResNet-{depth} with {block} blocks (He et al., 2016)",
    )


def _vgg(name: str) -> ArchitectureFacts:
    depth, _, norm = name.removeprefix("vgg").partition("_")
    return ArchitectureFacts(
        name=name,
        family="vgg",
        depth=int(depth),
        batch_norm=bool(norm),
        min_image_size={"small": 32, "imagenet": 32},
        description=f"VGG-{depth} {'with' if norm else 'without'} batch norm (Simonyan, 2015)",
    )


ARCHITECTURES: Mapping[str, ArchitectureFacts] = {
    name: _resnet(name) if name in RESNETS else _vgg(name) for name in ARCHS
}


@dataclass(frozen=True)
class DatasetFacts:
    """What `resolve` needs to know of a dataset. `image_size`: the side that training uses unless
    told otherwise, in pixels; `splits`: number of images of each split that exists."""

    name: str
    classes: tuple[str, ...]
    image_size: int
    splits: Mapping[str, int]
    description: str = ""
    needs_network: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.classes)


BUILTIN_DATASETS: Mapping[str, DatasetFacts] = {
    "digits": DatasetFacts(
        name="digits",
        classes=tuple("0123456789"),
        image_size=32,
        splits={"train": 1442, "test": 355},
        description="UCI handwritten digits, 8x8 grey, shipped with scikit-learn",
    ),
    "cifar10": DatasetFacts(
        name="cifar10",
        classes=(
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ),
        image_size=32,
        splits={"train": 50_000, "test": 10_000},
        description="CIFAR-10, 32x32 colour (Krizhevsky, 2009); downloaded by torchvision",
        needs_network=True,
    ),
}


def default_image_size(median_shorter_side: int) -> int:
    """The training size of a dataset: its median shorter side, rounded up to a multiple of 32,
    at least 32 and at most 224 pixels."""
    return min(224, max(32, -(-median_shorter_side // 32) * 32))


def resolve_stem(stem: Literal["auto", "small", "imagenet"], image_size: int) -> Stem:
    """The stem that `auto` stands for at this image size (pixels)."""
    if stem != "auto":
        return stem
    return "small" if image_size <= MAX_SMALL_STEM_SIZE else "imagenet"


def selection_split(spec: TrainSpec, splits: Container[str]) -> Literal["val", "test"]:
    """The split that selects the best checkpoint: a held-out share of train counts as `val`."""
    return "val" if spec.val_fraction is not None or "val" in splits else "test"


def evaluation_split(splits: Mapping[str, int]) -> Split:
    """The split that an evaluation takes when none is named."""
    return "test" if "test" in splits else "val"


def resolve(spec: TrainSpec, dataset: DatasetFacts) -> TrainSpec:
    """The spec with all that depends on the dataset written out.

    Raises:
        SpecRefused: the spec cannot work with this dataset; says which keys.
    """
    items: list[dict[str, str]] = []

    def refuse(loc: str, message: str) -> None:
        items.append({"loc": loc, "message": message})

    image_size = spec.image_size or dataset.image_size
    architecture = ARCHITECTURES[spec.model.arch]
    stem = resolve_stem(spec.model.stem, image_size)
    smallest = architecture.min_image_size[stem]
    if image_size < smallest:
        name = spec.model.arch
        if architecture.family == "resnet":
            name += f" with the stem {stem}"
        refuse(
            "image_size" if spec.image_size else "model.stem",
            f"{name} shrinks {image_size} px to nothing; it needs at least {smallest} px",
        )
    if architecture.family == "vgg" and spec.model.stem != "auto":
        refuse("model.stem", "Only a ResNet has a stem to choose; leave it out")
    if dataset.num_classes < 2:
        refuse("dataset", "A classifier needs at least two classes")
    if "train" not in dataset.splits:
        refuse("dataset", "The dataset has no split train")
    elif spec.val_fraction is None and not {"val", "test"} & set(dataset.splits):
        refuse("val_fraction", "The dataset has neither val nor test: hold out a share, e.g. 0.1")
    elif spec.val_fraction is not None and dataset.splits["train"] * spec.val_fraction < 1:
        refuse("val_fraction", "This share of train is less than one image")
    if len(set(spec.augment)) != len(spec.augment):
        refuse("augment", "Each augmentation can be named once")
    scheduler = spec.scheduler
    if scheduler.warmup_epochs >= spec.epochs and "warmup_epochs" in scheduler.model_fields_set:
        refuse("scheduler.warmup_epochs", "The warm-up must end before the last epoch")
    elif scheduler.warmup_epochs >= spec.epochs:
        scheduler = scheduler.model_copy(update={"warmup_epochs": 0.0})
    if isinstance(scheduler, Step):
        milestones = scheduler.milestones
        if milestones is None:
            milestones = tuple(sorted({max(1, spec.epochs // 2), max(1, spec.epochs * 3 // 4)}))
        elif list(milestones) != sorted(set(milestones)):
            refuse("scheduler.milestones", "Milestones are epochs in rising order")
        scheduler = scheduler.model_copy(update={"milestones": milestones})
    if items:
        raise SpecRefused(items)
    return spec.model_copy(update={"image_size": image_size, "scheduler": scheduler})


def resolve_evaluation(
    spec: EvaluateSpec, dataset: DatasetFacts, model_classes: tuple[str, ...]
) -> EvaluateSpec:
    """The evaluation with its split written out.

    Raises:
        SpecRefused: the split does not exist, or the dataset has other classes than the model.
    """
    split = spec.split or evaluation_split(dataset.splits)
    if split not in dataset.splits:
        have = ", ".join(dataset.splits) or "none"
        raise SpecRefused([{"loc": "split", "message": f"No split {split}; there is: {have}"}])
    if model_classes != dataset.classes:
        difference = sorted(set(model_classes) ^ set(dataset.classes))[:10]
        detail = f"they differ in: {', '.join(difference)}" if difference else "their order differs"
        raise SpecRefused(
            [{"loc": "dataset", "message": f"The dataset's classes are not the model's; {detail}"}]
        )
    return spec.model_copy(update={"split": split})
