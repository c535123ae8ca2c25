"""Facts that need neither torch nor a database: architectures, built-in datasets, and what fits
together. `resolve` writes every default of a spec out and refuses what cannot work."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from skipline.recipes import RECIPES
from skipline.schemas import ExportFormat
from skipline.specs import (
    IMAGENET_WEIGHTS,
    PUBLISHED,
    RESNETS,
    VGGS,
    AugmentSpec,
    Cutout,
    EvaluateSpec,
    ModelSpec,
    PredictSpec,
    RandomCrop,
    Step,
    TrainSpec,
)

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
    `parts` are the names of its modules, from the image to the head, as its weights are named.
    `has_imagenet_weights`: torchvision has weights for it.
    """

    name: str
    family: Literal["resnet", "vgg"]
    depth: int
    batch_norm: bool
    min_image_size: Mapping[Stem, int]
    parts: tuple[str, ...]
    description: str
    has_imagenet_weights: bool = True
    has_stems: bool = False


RESNET_PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")
VGG_PARTS = ("features", "classifier")


def _resnet(name: str) -> ArchitectureFacts:
    depth = int(name.removeprefix("resnet"))
    block = "basic" if depth < 50 else "bottleneck"
    return ArchitectureFacts(
        name=name,
        family="resnet",
        depth=depth,
        batch_norm=True,
        min_image_size={"small": 8, "imagenet": 32},
        parts=RESNET_PARTS,
        description=f"ResNet-{depth} with {block} blocks (He et al., 2016)",
        has_stems=True,
    )


def _vgg(name: str) -> ArchitectureFacts:
    depth, _, norm = name.removeprefix("vgg").partition("_")
    return ArchitectureFacts(
        name=name,
        family="vgg",
        depth=int(depth),
        batch_norm=bool(norm),
        min_image_size={"small": 32, "imagenet": 32},
        parts=VGG_PARTS,
        description=f"VGG-{depth} {'with' if norm else 'without'} batch norm (Simonyan, 2015)",
    )


_PUBLISHED = (
    ArchitectureFacts(
        name=PUBLISHED[0],
        family="resnet",
        depth=50,
        batch_norm=True,
        min_image_size={"small": 16, "imagenet": 16},
        parts=RESNET_PARTS,
        description="A published ResNet for 64 px: bottleneck stages of 3, 4, 6, 2; stride-1 stem",
        has_imagenet_weights=False,
    ),
    ArchitectureFacts(
        name=PUBLISHED[1],
        family="vgg",
        depth=14,
        batch_norm=False,
        min_image_size={"small": 16, "imagenet": 16},
        parts=VGG_PARTS,
        description="A published VGG for 64 px: ten convolutions, four linear layers",
        has_imagenet_weights=False,
    ),
)

ARCHITECTURES: Mapping[str, ArchitectureFacts] = (
    {name: _resnet(name) for name in RESNETS}
    | {name: _vgg(name) for name in VGGS}
    | {facts.name: facts for facts in _PUBLISHED}
)


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


_CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
_FASHION_MNIST_CLASSES = (
    "Ankle boot, Bag, Coat, Dress, Pullover, Sandal, Shirt, Sneaker, T-shirt/top, Trouser"
)
_STL10_CLASSES = "airplane bird car cat deer dog horse monkey ship truck"
_TINYIMAGENET_CLASSES = """
    African elephant, American alligator, American lobster, Arabian camel, CD player, Chihuahua,
    Christmas stocking, Egyptian cat, European fire salamander, German shepherd,
    Labrador retriever, Persian cat, Yorkshire terrier, abacus, academic gown, acorn, albatross,
    alp, altar, apron, baboon, backpack, banana, bannister, barbershop, barn, barrel, basketball,
    bathtub, beach wagon, beacon, beaker, bee, beer bottle, bell pepper, bighorn, bikini,
    binoculars, birdhouse, bison, black stork, black widow, boa constrictor, bow tie, brain coral,
    brass, broom, brown bear, bucket, bullet train, bullfrog, butcher shop, candle, cannon,
    cardigan, cash machine, cauliflower, centipede, chain, chest, chimpanzee, cliff,
    cliff dwelling, cockroach, comic book, computer keyboard, confectionery, convertible,
    coral reef, cougar, crane, dam, desk, dining table, dragonfly, drumstick, dugong, dumbbell,
    espresso, flagpole, fly, fountain, freight car, frying pan, fur coat, gasmask, gazelle,
    go-kart, golden retriever, goldfish, gondola, goose, grasshopper, guacamole, guinea pig, hog,
    hourglass, iPod, ice cream, ice lolly, jellyfish, jinrikisha, kimono, king penguin, koala,
    ladybug, lakeside, lampshade, lawn mower, lemon, lesser panda, lifeboat, limousine, lion,
    magnetic compass, mantis, mashed potato, maypole, meat loaf, military uniform, miniskirt,
    monarch, moving van, mushroom, nail, neck brace, obelisk, oboe, orange, orangutan, organ, ox,
    parking meter, pay-phone, picket fence, pill bottle, pizza, plate, plunger, pole, police van,
    pomegranate, poncho, pop bottle, potpie, potter's wheel, pretzel, projectile, punching bag,
    reel, refrigerator, remote control, rocking chair, rugby ball, sandal, school bus, scoreboard,
    scorpion, sea cucumber, sea slug, seashore, sewing machine, slug, snail, snorkel, sock,
    sombrero, space heater, spider web, spiny lobster, sports car, standard poodle,
    steel arch bridge, stopwatch, sulphur butterfly, sunglasses, suspension bridge,
    swimming trunks, syringe, tabby, tailed frog, tarantula, teapot, teddy, thatch, torch,
    tractor, trilobite, triumphal arch, trolleybus, turnstile, umbrella, vestment, viaduct,
    volleyball, walking stick, water jug, water tower, wok, wooden spoon
"""
NUM_STL10_FOLDS = 10


def _stl10(name: str, num_train: int, description: str) -> DatasetFacts:
    return DatasetFacts(
        name=name,
        classes=tuple(_STL10_CLASSES.split()),
        image_size=96,
        splits={"train": num_train, "test": 8_000},
        description=f"STL-10, 96x96 colour, {description} (Coates, Ng & Lee, 2011)",
        needs_network=True,
    )


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
        description="CIFAR-10, 32x32 colour (Krizhevsky, 2009)",
        needs_network=True,
    ),
    "cifar100": DatasetFacts(
        name="cifar100",
        classes=tuple(_CIFAR100_CLASSES.split()),
        image_size=32,
        splits={"train": 50_000, "test": 10_000},
        description="CIFAR-100 with its fine labels, 32x32 colour (Krizhevsky, 2009)",
        needs_network=True,
    ),
    "fashion_mnist": DatasetFacts(
        name="fashion_mnist",
        classes=tuple(_FASHION_MNIST_CLASSES.split(", ")),
        image_size=32,
        splits={"train": 60_000, "test": 10_000},
        description="Fashion-MNIST, 28x28 grey (Xiao, Rasul & Vollgraf, 2017)",
        needs_network=True,
    ),
    "stl10": _stl10("stl10", 5_000, "without its unlabelled images"),
    **{
        f"stl10_fold{fold}": _stl10(f"stl10_fold{fold}", 1_000, f"predefined fold {fold} of train")
        for fold in range(NUM_STL10_FOLDS)
    },
    "tinyimagenet": DatasetFacts(
        name="tinyimagenet",
        classes=tuple(name.strip() for name in _TINYIMAGENET_CLASSES.split(",")),
        image_size=64,
        splits={"train": 100_000, "val": 10_000},
        description="TinyImageNet, 200 classes, 64x64 JPEG (Le & Yang, 2015)",
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


EXPORT_SUFFIXES: dict[ExportFormat, str] = {
    "safetensors": ".safetensors",
    "onnx": ".onnx",
    "torchscript": ".pt",
    "torch_export": ".pt2",
}


def evaluation_split(splits: Mapping[str, int]) -> Split:
    """The split that an evaluation takes when none is named."""
    return "test" if "test" in splits else "val"


@dataclass(frozen=True)
class ClusterFacts:
    """What the living workers have: `max_gpus` is the number of GPUs of the one with the most."""

    max_gpus: int


Refuse = Callable[[str, str], None]
"""Takes a key and what is wrong with its value."""


def resolve(
    spec: TrainSpec, dataset: DatasetFacts, cluster: ClusterFacts | None = None
) -> TrainSpec:
    """The spec with all that depends on the dataset written out. `cluster` is None where no worker
    is known: a job may be there first.

    Raises:
        SpecRefused: the spec cannot work with this dataset, or nowhere; says which keys.
    """
    items: list[dict[str, str]] = []

    def refuse(loc: str, message: str) -> None:
        items.append({"loc": loc, "message": message})

    image_size = _image_size(spec, dataset, refuse)
    _check_model(spec, image_size, refuse)
    _check_splits(spec, dataset, refuse)
    _check_resources(spec, cluster, refuse)
    scheduler = _scheduler(spec, refuse)
    augment = _augment(spec, image_size, refuse)
    if items:
        raise SpecRefused(items)
    return spec.model_copy(
        update={"image_size": image_size, "scheduler": scheduler, "augment": augment}
    )


def _image_size(spec: TrainSpec, dataset: DatasetFacts, refuse: Refuse) -> int:
    if spec.image_size is not None:
        return spec.image_size
    if spec.recipe is None:
        return dataset.image_size
    recipe = RECIPES[spec.recipe]
    if dataset.image_size != recipe.dataset_image_size:
        refuse(
            "recipe",
            f"{recipe.name} is made for images of {recipe.dataset_image_size} px and those of "
            f"{dataset.name} have {dataset.image_size} px; set image_size if you mean it",
        )
    size: int = recipe.spec.get("image_size", recipe.dataset_image_size)
    return size


def _check_model(spec: TrainSpec, image_size: int, refuse: Refuse) -> None:
    model, facts = spec.model, ARCHITECTURES[spec.model.arch]
    stem = resolve_stem(model.stem, image_size)
    smallest = facts.min_image_size[stem]
    if image_size < smallest:
        name = f"{model.arch} with the stem {stem}" if facts.has_stems else model.arch
        refuse(
            "image_size" if spec.image_size else "model.stem",
            f"{name} shrinks {image_size} px to nothing; it needs at least {smallest} px",
        )
    if not facts.has_stems and model.stem != "auto":
        refuse("model.stem", f"{model.arch} has no stem to choose; leave it out")
    if facts.family != "resnet" and model.stochastic_depth:
        refuse("model.stochastic_depth", "Only a ResNet has residual branches to drop")
    if model.init_from == IMAGENET_WEIGHTS and not facts.has_imagenet_weights:
        refuse("model.init_from", f"There are no weights of {model.arch} to start from")
    elif model.init_from == IMAGENET_WEIGHTS and facts.has_stems and stem != "imagenet":
        refuse("model.init_from", "These weights have ImageNet's stem: set model.stem to imagenet")
    _check_frozen_parts(model, facts, refuse)


def _check_frozen_parts(model: ModelSpec, facts: ArchitectureFacts, refuse: Refuse) -> None:
    parts = ", ".join(facts.parts)
    if unknown := [name for name in model.freeze if name not in facts.parts]:
        refuse("model.freeze", f"{model.arch} has no part {unknown[0]}; its parts are: {parts}")
    elif set(facts.parts) <= set(model.freeze):
        refuse("model.freeze", "With every part frozen there is nothing to train")


def _check_splits(spec: TrainSpec, dataset: DatasetFacts, refuse: Refuse) -> None:
    if dataset.num_classes < 2:
        refuse("dataset", "A classifier needs at least two classes")
    if "train" not in dataset.splits:
        refuse("dataset", "The dataset has no split train")
    elif spec.val_fraction is None and not {"val", "test"} & set(dataset.splits):
        refuse("val_fraction", "The dataset has neither val nor test: hold out a share, e.g. 0.1")
    elif spec.val_fraction is not None and dataset.splits["train"] * spec.val_fraction < 1:
        refuse("val_fraction", "This share of train is less than one image")


def needs_gpu(spec: TrainSpec) -> bool:
    """Whether the training cannot run on a CPU."""
    return spec.resources.device == "cuda" or spec.precision in ("tf32", "fp16")


def _check_resources(spec: TrainSpec, cluster: ClusterFacts | None, refuse: Refuse) -> None:
    device, num_processes = spec.resources.device, spec.resources.num_processes
    max_gpus = cluster.max_gpus if cluster else None
    if spec.precision in ("tf32", "fp16") and (device == "cpu" or max_gpus == 0):
        where = "and the job asks for the CPU" if device == "cpu" else "and no worker has one"
        refuse("precision", f"{spec.precision} needs a GPU {where}; use auto, fp32 or bf16")
    elif needs_gpu(spec) and max_gpus is not None and num_processes > max_gpus:
        has = f"the worker with the most has {max_gpus}" if max_gpus else "no worker has a GPU"
        refuse("resources.num_processes", f"Each process needs a GPU of its own, and {has}")
    parts = num_processes * spec.accumulate_steps
    if spec.batch_size % (parts * spec.part_unit) and (parts > 1 or spec.batch_size == 1):
        key = "accumulate_steps" if spec.accumulate_steps > 1 else "resources.num_processes"
        pairs = " of pairs, which mixing needs" if spec.part_unit > 1 else ""
        if parts == 1:
            refuse("batch_size", "Mixing needs two images at least")
        else:
            refuse(
                key, f"A batch of {spec.batch_size} cannot be cut into {parts} equal parts{pairs}"
            )


def _scheduler(spec: TrainSpec, refuse: Refuse) -> Any:
    """The schedule with its milestones, and without a warm-up that nobody asked for and that the
    run is too short for."""
    scheduler = spec.scheduler
    warmup_epochs = getattr(scheduler, "warmup_epochs", 0.0)
    recipe = RECIPES[spec.recipe].spec.get("scheduler", {}) if spec.recipe else {}
    is_asked_for = "warmup_epochs" in scheduler.model_fields_set and warmup_epochs != recipe.get(
        "warmup_epochs"
    )
    if warmup_epochs >= spec.epochs and is_asked_for:
        refuse("scheduler.warmup_epochs", "The warm-up must end before the last epoch")
    elif warmup_epochs >= spec.epochs:
        scheduler = scheduler.model_copy(update={"warmup_epochs": 0.0})
    if isinstance(scheduler, Step):
        milestones = scheduler.milestones
        if milestones is None:
            milestones = tuple(sorted({max(1, spec.epochs // 2), max(1, spec.epochs * 3 // 4)}))
        elif list(milestones) != sorted(set(milestones)):
            refuse("scheduler.milestones", "Milestones are epochs in rising order")
        scheduler = scheduler.model_copy(update={"milestones": milestones})
    return scheduler


EXCLUSIVE = (("random_crop", "random_resized_crop"), ("rand_augment", "trivial_augment"))


def _augment(spec: TrainSpec, image_size: int, refuse: Refuse) -> tuple[AugmentSpec, ...]:
    """The augmentations with the sizes that depend on the image."""
    names = [item.name for item in spec.augment]
    for name in sorted({name for name in names if names.count(name) > 1}):
        refuse("augment", f"{name} can be named once")
    for one, other in EXCLUSIVE:
        if one in names and other in names:
            refuse("augment", f"Take either {one} or {other}")
    resolved: list[AugmentSpec] = []
    for place, item in enumerate(spec.augment):
        if isinstance(item, Cutout):
            if (item.size or 1) > image_size:
                refuse(f"augment.{place}.size", f"Larger than the image, which has {image_size} px")
            item = item.model_copy(update={"size": item.size or image_size // 2})
        if isinstance(item, RandomCrop) and (item.padding or 1) > image_size:
            refuse(f"augment.{place}.padding", f"Wider than the image, which has {image_size} px")
        resolved.append(item)
    return tuple(resolved)


def resolve_evaluation(
    spec: EvaluateSpec, dataset: DatasetFacts, model_classes: tuple[str, ...] | None
) -> EvaluateSpec:
    """The evaluation with its split written out. `model_classes`: None while they are not known.

    Raises:
        SpecRefused: the split does not exist, the dataset has other classes than the model, or
            several processes are asked for.
    """
    _check_one_process(spec)
    split = spec.split or evaluation_split(dataset.splits)
    _check_split(split, dataset)
    if model_classes is not None and model_classes != dataset.classes:
        difference = sorted(set(model_classes) ^ set(dataset.classes))[:10]
        detail = f"they differ in: {', '.join(difference)}" if difference else "their order differs"
        raise SpecRefused(
            [{"loc": "dataset", "message": f"The dataset's classes are not the model's; {detail}"}]
        )
    return spec.model_copy(update={"split": split})


def check_prediction(spec: PredictSpec, dataset: DatasetFacts | None) -> None:
    """Raises `SpecRefused`: the dataset has no such split, or several processes are asked for."""
    _check_one_process(spec)
    if dataset is not None and spec.split is not None:
        _check_split(spec.split, dataset)


def _check_one_process(spec: EvaluateSpec | PredictSpec) -> None:
    if spec.resources.num_processes > 1:
        message = "Only a training runs in several processes"
        raise SpecRefused([{"loc": "resources.num_processes", "message": message}])


def _check_split(split: str, dataset: DatasetFacts) -> None:
    if split not in dataset.splits:
        have = ", ".join(dataset.splits) or "none"
        raise SpecRefused([{"loc": "split", "message": f"No split {split}; there is: {have}"}])
