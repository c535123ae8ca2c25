"""What a client may ask for: the specs of training, evaluation and ingest jobs.

Specs are frozen, refuse unknown keys and non-finite numbers, and check whatever can be checked
without knowing the dataset. What needs facts (does the stem fit this dataset's images?) is
checked by `skipline.catalog.resolve`. This file knows nothing of torch, SQL or HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    field_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from skipline.recipes import RECIPES, expand

SPEC_VERSION: Literal[1] = 1


class Spec(BaseModel):
    """Base of all specs: immutable, strict about keys, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _label(value: str) -> str:
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise PydanticCustomError("control_character", "Control characters are not allowed here")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("not_unicode", "This is not valid Unicode text") from None
    return value


def _known(*names: str) -> Any:
    """A validator that lists the allowed names when it refuses one."""

    def check(value: str) -> str:
        if value not in names:
            raise PydanticCustomError(
                "unknown_name", "Unknown name; choose one of: {names}", {"names": ", ".join(names)}
            )
        return value

    return AfterValidator(check)


Label = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_label)]
Reference = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_label)]
"""An id or a name of something stored elsewhere: a dataset, a job, a checkpoint."""
Tags = Annotated[tuple[Label, ...], Field(max_length=20)]
JobReference = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_label)]
"""A job's id, or an upload's."""
Priority = Annotated[int, Field(ge=-10, le=10)]
"""Higher ones run first; among equals, the one that came first."""
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Epochs = Annotated[int, Field(ge=1, le=10_000)]
RecipeName = Annotated[str, _known(*RECIPES), Field(json_schema_extra={"enum": list(RECIPES)})]

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
VGGS = ("vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn")
PUBLISHED = ("resnet50_64px", "vgg10_64px")
"""Networks of published systems for TinyImageNet; `docs/recipes.md` describes them."""
ARCHS = RESNETS + VGGS + PUBLISHED


UNKNOWN_VARIANT = "unknown_variant:"
"""Begins the type of an error whose rest is the key that chooses the variant."""


def _choose_by(key: str, default: str, *names: str) -> Discriminator:
    """Chooses among variants by the value of `key`; a missing key means `default`.

    Tags are written `<name>`, so that `error_items` can tell them from keys of the input.
    """

    def tag(value: Any) -> str | None:
        if isinstance(value, Mapping):
            name = value.get(key, default)
        else:
            name = getattr(value, key, default)
        return f"<{name}>" if isinstance(name, str) and name in names else None

    return Discriminator(
        tag,
        custom_error_type=f"{UNKNOWN_VARIANT}{key}",
        custom_error_message=f"Unknown {key}; choose one of: {', '.join(names)}",
    )


PRODUCTION = "production"
"""The alias of the model that answers predictions, unless another is named."""
IMAGENET_WEIGHTS = "imagenet"
"""The value of `model.init_from` that means torchvision's weights."""


class ModelSpec(Spec):
    """The network.

    `stem` of a ResNet: `small` is a 3x3 convolution with stride 1 and no pooling, `imagenet` the
    7x7 with stride 2 and a max pool; `auto` takes `small` up to 64 px. `dropout` acts before the
    head (in `vgg10_64px` after every stage, in torchvision's VGGs within the head);
    `stochastic_depth` drops residual branches of a ResNet, image by image, with a rate that rises
    linearly to this value at the last block (Huang et al., 2016).

    `init`: `kaiming` draws convolutions from He's normal distribution (fan-out), linear layers from
    normal(0, 0.01), and sets norms to one and biases to zero; `torch` leaves each layer as torch
    makes it. `init_from` starts from an earlier model instead (a job, a checkpoint or an alias; a
    head for another number of classes is made new), or with `imagenet` from torchvision's weights.
    Parts named in `freeze` (`conv1`, `layer1`, `features`, ...) are not trained, their norms
    included.
    """

    arch: Annotated[str, _known(*ARCHS)] = "resnet18"
    stem: Literal["auto", "small", "imagenet"] = "auto"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    stochastic_depth: Annotated[float, Field(ge=0, lt=1)] = 0.0
    init: Literal["kaiming", "torch"] = "kaiming"
    init_from: Reference | None = None
    freeze: Annotated[tuple[Label, ...], Field(max_length=20)] = ()


class _Optimizer(Spec):
    """`decay_norm_and_bias: false` spares biases and the scales of norms the weight decay."""

    decay_norm_and_bias: bool = True


class SGD(_Optimizer):
    """Stochastic gradient descent with momentum; weight decay as an L2 term."""

    name: Literal["sgd"] = "sgd"
    lr: Annotated[float, Field(gt=0, le=1000)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 5e-4

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise PydanticCustomError("nesterov", "nesterov needs a momentum above 0")
        return self


class _AdamParameters(_Optimizer):
    lr: Annotated[float, Field(gt=0, le=1000)] = 1e-3
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8


class Adam(_AdamParameters):
    """Adam (Kingma & Ba, 2015); weight decay as an L2 term."""

    name: Literal["adam"] = "adam"
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0


class AdamW(_AdamParameters):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019)."""

    name: Literal["adamw"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01


OptimizerSpec = Annotated[
    Annotated[SGD, Tag("<sgd>")]
    | Annotated[Adam, Tag("<adam>")]
    | Annotated[AdamW, Tag("<adamw>")],
    _choose_by("name", "sgd", "sgd", "adam", "adamw"),
]


class _Schedule(Spec):
    """Warm-up raises the lr linearly, step by step, over the first `warmup_epochs` epochs."""

    warmup_epochs: Annotated[float, Field(ge=0, le=1000)] = 0.0


class Constant(_Schedule):
    """The lr stays as it is."""

    name: Literal["constant"] = "constant"


class Cosine(_Schedule):
    """Half a cosine from lr to `min_lr`, step by step (Loshchilov & Hutter, 2017)."""

    name: Literal["cosine"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0, le=1000)] = 1.0
    min_lr: Annotated[float, Field(ge=0)] = 0.0


class Step(_Schedule):
    """The lr times `gamma` after each epoch in `milestones`; by default at 50 % and 75 %."""

    name: Literal["step"] = "step"
    milestones: Annotated[tuple[Epochs, ...] | None, Field(max_length=100)] = None
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1


class Plateau(_Schedule):
    """The lr times `factor` when the validation loss has not improved for `patience` epochs,
    as torch's ReduceLROnPlateau in mode min with its relative threshold of 1e-4."""

    name: Literal["plateau"] = "plateau"
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    patience: Annotated[int, Field(ge=0, le=10_000)] = 10
    min_lr: Annotated[float, Field(ge=0)] = 0.0


class OneCycle(Spec):
    """From lr / `div_factor` up to lr over the first `pct_start` of all steps, then down to
    lr / `div_factor` / `final_div_factor` (Smith & Topin, 2018), as torch's OneCycleLR without its
    change of momentum."""

    name: Literal["one_cycle"] = "one_cycle"
    pct_start: Fraction = 0.3
    div_factor: Annotated[float, Field(ge=1, le=1e6)] = 25.0
    final_div_factor: Annotated[float, Field(ge=1, le=1e9)] = 1e4
    anneal: Literal["cos", "linear"] = "cos"


SchedulerSpec = Annotated[
    Annotated[Constant, Tag("<constant>")]
    | Annotated[Cosine, Tag("<cosine>")]
    | Annotated[Step, Tag("<step>")]
    | Annotated[Plateau, Tag("<plateau>")]
    | Annotated[OneCycle, Tag("<one_cycle>")],
    _choose_by("name", "cosine", "cosine", "step", "plateau", "constant", "one_cycle"),
]


class LossSpec(Spec):
    """Cross-entropy; `label_smoothing` spreads that share of the target over all classes."""

    name: Annotated[str, _known("cross_entropy")] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class CheckpointSpec(Spec):
    """When to write checkpoints and how many to keep.

    `keep_best` by `monitor`, `keep_last` by age, and for good those of each `keep_every_epochs`-th
    epoch; one is written every `every_epochs` epochs, and within an epoch when the last is older
    than `every_minutes`.
    """

    keep_best: Annotated[int, Field(ge=1, le=100)] = 1
    keep_last: Annotated[int, Field(ge=1, le=100)] = 1
    keep_every_epochs: Epochs | None = None
    every_epochs: Epochs = 1
    every_minutes: Annotated[float, Field(gt=0, le=10_000)] = 10.0
    monitor: Literal["val_loss", "val_top1"] = "val_loss"
    mode: Literal["min", "max"] = "min"

    @model_validator(mode="before")
    @classmethod
    def _mode_follows_monitor(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "mode" not in value:
            best = "max" if value.get("monitor") == "val_top1" else "min"
            return {**value, "mode": best}
        return value

    @model_validator(mode="after")
    def _mode_fits_monitor(self) -> Self:
        if (self.monitor == "val_top1") != (self.mode == "max"):
            raise PydanticCustomError("mode", "A loss is minimised and an accuracy maximised")
        return self


class EarlyStoppingSpec(Spec):
    """Ends training when the checkpoint's `monitor` has not improved by more than `min_delta` for
    `patience` epochs."""

    patience: Annotated[int, Field(ge=1, le=10_000)] = 10
    min_delta: Annotated[float, Field(ge=0, le=1000)] = 0.0


class ResourcesSpec(Spec):
    """Where the job runs; `auto` takes a CUDA GPU if the worker has one, else the CPU.

    `num_processes` share each batch: one GPU each, or on the CPU its cores.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_processes: Annotated[int, Field(ge=1, le=64)] = 1


class RandomCrop(Spec):
    """Pads with black by `padding` pixels (by default an eighth of the side) and cuts a square of
    the old size anywhere."""

    name: Literal["random_crop"] = "random_crop"
    padding: Annotated[int, Field(ge=1, le=512)] | None = None


class RandomResizedCrop(Spec):
    """Cuts out `min_scale` to 1 of the area, with sides in a ratio of 3:4 to 4:3, and resizes it
    (Szegedy et al., 2015)."""

    name: Literal["random_resized_crop"] = "random_resized_crop"
    min_scale: Annotated[float, Field(ge=0.01, le=1)] = 0.35


class HorizontalFlip(Spec):
    """Mirrors every other image."""

    name: Literal["horizontal_flip"] = "horizontal_flip"


class Cutout(Spec):
    """Blanks a square of `size` pixels whose centre lies anywhere in the image (DeVries & Taylor,
    2017); by default half the side."""

    name: Literal["cutout"] = "cutout"
    size: Annotated[int, Field(ge=1, le=1024)] | None = None


class Mixup(Spec):
    """Mixes each image and its label with another's, in shares from Beta(`alpha`, `alpha`)
    (Zhang et al., 2018)."""

    name: Literal["mixup"] = "mixup"
    alpha: Annotated[float, Field(gt=0, le=10)] = 0.2


class CutMix(Spec):
    """Pastes a rectangle of another image, and mixes the labels by area (Yun et al., 2019). Beside
    `mixup`, each image gets one of the two."""

    name: Literal["cutmix"] = "cutmix"
    alpha: Annotated[float, Field(gt=0, le=10)] = 1.0


class RandAugment(Spec):
    """`num_ops` random operations of strength `magnitude` out of 30 (Cubuk et al., 2020)."""

    name: Literal["rand_augment"] = "rand_augment"
    num_ops: Annotated[int, Field(ge=1, le=4)] = 2
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9


class TrivialAugment(Spec):
    """One random operation of random strength (Müller & Hutter, 2021; the wide ranges)."""

    name: Literal["trivial_augment"] = "trivial_augment"


AugmentName = Literal[
    "random_crop",
    "random_resized_crop",
    "horizontal_flip",
    "cutout",
    "mixup",
    "cutmix",
    "rand_augment",
    "trivial_augment",
]


def _augmentation_by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


_AugmentObject = Annotated[
    Annotated[RandomCrop, Tag("<random_crop>")]
    | Annotated[RandomResizedCrop, Tag("<random_resized_crop>")]
    | Annotated[HorizontalFlip, Tag("<horizontal_flip>")]
    | Annotated[Cutout, Tag("<cutout>")]
    | Annotated[Mixup, Tag("<mixup>")]
    | Annotated[CutMix, Tag("<cutmix>")]
    | Annotated[RandAugment, Tag("<rand_augment>")]
    | Annotated[TrivialAugment, Tag("<trivial_augment>")],
    _choose_by("name", "", *get_args(AugmentName)),
]
AugmentSpec = Annotated[
    _AugmentObject,
    BeforeValidator(_augmentation_by_name, json_schema_input_type=AugmentName | _AugmentObject),
]
"""An augmentation as an object, or by its name alone."""

Channels = tuple[float, float, float]


class ChannelsSpec(Spec):
    """Mean and standard deviation of red, green and blue, for values scaled to [0, 1]."""

    mean: Channels
    std: tuple[Positive, Positive, Positive]


NormalizeSpec = Annotated[
    Annotated[Literal["dataset", "image_std", "imagenet"], Tag("<name>")]
    | Annotated[ChannelsSpec, Tag("<channels>")],
    Discriminator(
        lambda value: "<channels>" if isinstance(value, Mapping | ChannelsSpec) else "<name>"
    ),
]


Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
DataPath = Literal["auto", "resident", "mapped", "files"]


def _require_dataset_or_recipe(schema: dict[str, Any]) -> None:
    schema["required"] = [key for key in schema.get("required", []) if key != "dataset"]
    schema["anyOf"] = [{"required": ["dataset"]}, {"required": ["recipe"]}]


class TrainSpec(Spec):
    """A training: what to train, on what, and how. Stored specs are resolved: no default is left
    to the reader's imagination.

    - `recipe` names what filled the spec in; what is given beside it wins.
    - `parent_id` names the job that this one continues or belongs to; `after` one that has to
      succeed before this one runs, and whose failure is this one's too.
    - `normalize`: `dataset` takes mean and standard deviation of the training split, `image_std`
      the mean over its images of each one's standard deviation, `imagenet` ImageNet's.
    - `batch_size`: images of one optimizer step, whatever `accumulate_steps` (passes in which a
      step is made, to save memory) and `resources.num_processes` cut it into.
    - `ema_decay`: validates and stores an exponential moving average of the weights.
    - `time_budget_seconds`: of training, over all attempts; ends with what there is by then.
    - `data_path`: `resident` keeps the packed images in the device's memory, `mapped` reads them
      from the disk as they are needed, `files` decodes the original files each time.
    - `sanity_check`: one batch of training and one of validation an epoch.
    """

    model_config = ConfigDict(json_schema_extra=_require_dataset_or_recipe)

    kind: Literal["train"] = "train"
    spec_version: Literal[1] = SPEC_VERSION
    name: Label | None = None
    tags: Tags = ()
    recipe: RecipeName | None = None
    dataset: Reference
    parent_id: JobReference | None = None
    after: JobReference | None = None
    priority: Priority = 0
    model: ModelSpec = ModelSpec()
    image_size: Annotated[int, Field(ge=8, le=1024)] | None = None
    augment: Annotated[tuple[AugmentSpec, ...], Field(max_length=10)] = (
        RandomCrop(),
        HorizontalFlip(),
    )
    normalize: NormalizeSpec = "dataset"
    epochs: Epochs = 20
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 256
    val_fraction: Annotated[float, Field(gt=0, le=0.9)] | None = None
    optimizer: OptimizerSpec = SGD()
    scheduler: SchedulerSpec = Cosine()
    loss: LossSpec = LossSpec()
    precision: Precision = "auto"
    channels_last: bool = True
    compile: Literal["auto", True, False] = "auto"
    ema_decay: Fraction | None = None
    accumulate_steps: Annotated[int, Field(ge=1, le=1024)] = 1
    gradient_clip_norm: Positive | None = None
    early_stopping: EarlyStoppingSpec | None = None
    time_budget_seconds: Annotated[float, Field(gt=0, le=1e8)] | None = None
    data_path: DataPath = "auto"
    sanity_check: bool = False
    deterministic: bool = False
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    checkpoint: CheckpointSpec = CheckpointSpec()
    log_every_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    resources: ResourcesSpec = ResourcesSpec()

    @property
    def part_unit(self) -> int:
        """What the number of images in each part of a batch is a multiple of: images are mixed in
        pairs, which stay together."""
        return 2 if any(isinstance(item, Mixup | CutMix) for item in self.augment) else 1

    @field_serializer("augment")
    def _names_alone_stay_names(self, augment: tuple[Any, ...]) -> list[Any]:
        """What has nothing to set, or only what depends on the image, is written as its name."""
        documents = [item.model_dump(mode="json") for item in augment]
        return [
            {key: value for key, value in document.items() if value is not None}
            if any(value is not None for key, value in document.items() if key != "name")
            else document["name"]
            for document in documents
        ]


class EvaluateSpec(Spec):
    """An evaluation of a stored model (a job's id means its best checkpoint) on a split;
    `split: null` takes `test`, else `val`. With `after` it waits for a job, which may be the one
    that makes the model."""

    kind: Literal["evaluate"] = "evaluate"
    spec_version: Literal[1] = SPEC_VERSION
    name: Label | None = None
    tags: Tags = ()
    model: Reference
    dataset: Reference
    parent_id: JobReference | None = None
    after: JobReference | None = None
    priority: Priority = 0
    split: Literal["train", "val", "test"] | None = None
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 256
    resources: ResourcesSpec = ResourcesSpec()


class PredictSpec(Spec):
    """A batch prediction: answers for all images of a dataset or of one of its splits, or of an
    archive that was uploaded, in whatever folders they lie there. `model` is an alias, or the id
    of a job, for its best checkpoint, or of a checkpoint; `top_k`: how many classes to name."""

    kind: Literal["predict"] = "predict"
    spec_version: Literal[1] = SPEC_VERSION
    name: Label | None = None
    tags: Tags = ()
    model: Reference = PRODUCTION
    dataset: Reference | None = None
    split: Literal["train", "val", "test"] | None = None
    upload_id: JobReference | None = None
    top_k: Annotated[int, Field(ge=1, le=1000)] = 5
    parent_id: JobReference | None = None
    after: JobReference | None = None
    priority: Priority = 0
    resources: ResourcesSpec = ResourcesSpec()

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.dataset is None) == (self.upload_id is None):
            raise PydanticCustomError("one_source", "Give either dataset or upload_id")
        if self.split is not None and self.dataset is None:
            raise PydanticCustomError("no_split", "Only a dataset has a split")
        return self


LOADED = "loaded"
"""No alias, since `/models/loaded` is something else."""


def _alias(value: str) -> str:
    if _ID.fullmatch(value) or value in (IMAGENET_WEIGHTS, LOADED):
        raise PydanticCustomError("ambiguous_alias", "This could be taken for something else")
    return value


def _text(value: str) -> str:
    for line in value.splitlines():
        _label(line.replace("\t", " "))
    return value


_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
AliasName = Annotated[
    str,
    Field(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9._-]*$"),
    AfterValidator(_alias),
]


class AliasChange(Spec):
    """What to do with an alias: let it stand for another model (a checkpoint's id, a job's for its
    best checkpoint, or another alias), and say what of it. What is not given stays."""

    checkpoint_id: Reference | None = None
    notes: Annotated[str, Field(max_length=4000), AfterValidator(_text)] | None = None
    tags: Tags | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not self.model_fields_set:
            raise PydanticCustomError("empty", "Give checkpoint_id, notes or tags")
        return self


class IngestSpec(Spec):
    """Bringing a dataset in: a folder or archive of class folders on the server's disk, an archive
    that was uploaded, or a built-in by name. `val_fraction` holds out that share of `train` as
    `val`, class by class; `seed` chooses which."""

    kind: Literal["ingest"] = "ingest"
    spec_version: Literal[1] = SPEC_VERSION
    source: Literal["path", "upload", "builtin"] = "path"
    name: Label | None = None
    path: Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_label)] | None = None
    upload_id: JobReference | None = None
    val_fraction: Annotated[float, Field(gt=0, le=0.9)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0

    @model_validator(mode="after")
    def _source_is_complete(self) -> Self:
        named_by = {"path": "path", "upload": "upload_id", "builtin": "name"}
        key = named_by[self.source]
        if getattr(self, key) is None:
            raise PydanticCustomError(
                f"missing_{key}",
                "source: {source} needs the key {key}",
                {"source": self.source, "key": key},
            )
        for other in ("path", "upload_id"):
            if other != key and getattr(self, other) is not None:
                raise PydanticCustomError(
                    "ambiguous_source",
                    "source: {source} takes no {key}",
                    {"source": self.source, "key": other},
                )
        return self


class ImportSpec(Spec):
    """Taking in a model that was exported as safetensors and uploaded."""

    kind: Literal["import"] = "import"
    spec_version: Literal[1] = SPEC_VERSION
    name: Label | None = None
    upload_id: JobReference


BringInSpec = IngestSpec | ImportSpec
"""Of jobs that bring something in, and compute nothing."""
RequestSpec = TrainSpec | EvaluateSpec | PredictSpec | ImportSpec
JobRequest = Annotated[
    Annotated[TrainSpec, Tag("<train>")]
    | Annotated[EvaluateSpec, Tag("<evaluate>")]
    | Annotated[PredictSpec, Tag("<predict>")]
    | Annotated[ImportSpec, Tag("<import>")],
    _choose_by("kind", "train", "train", "evaluate", "predict", "import"),
]
"""What `POST /jobs` takes."""

JobSpec = Annotated[
    Annotated[TrainSpec, Tag("<train>")]
    | Annotated[EvaluateSpec, Tag("<evaluate>")]
    | Annotated[PredictSpec, Tag("<predict>")]
    | Annotated[ImportSpec, Tag("<import>")]
    | Annotated[IngestSpec, Tag("<ingest>")],
    _choose_by("kind", "train", "train", "evaluate", "predict", "import", "ingest"),
]
"""What a stored job holds."""

AnySpec = RequestSpec | IngestSpec

_request_adapter: TypeAdapter[RequestSpec] = TypeAdapter(JobRequest)
_spec_adapter: TypeAdapter[AnySpec] = TypeAdapter(JobSpec)


def parse_request(document: Any) -> RequestSpec:
    """Fills in what the recipe says, if one is named, and checks what a client sent to
    `POST /jobs`. Raises pydantic's `ValidationError`."""
    return _request_adapter.validate_python(expand(document))


def load_spec(document: Any) -> AnySpec:
    """Reads a stored spec. A later `spec_version` migrates older documents here."""
    return _spec_adapter.validate_python(document)


def dump_spec(spec: Spec) -> dict[str, Any]:
    """The spec as JSON-ready values, every default written out."""
    return spec.model_dump(mode="json")


def error_items(errors: Sequence[Any] | ValidationError) -> list[dict[str, str]]:
    """Pydantic's errors as `[{"loc": "optimizer.lr", "message": …}]`.

    `loc` is the full key as the client wrote it: tags of variants, and the part of the request
    with which the framework's own errors begin, are left out, and an unknown variant is located
    at the key that chooses it.
    """
    is_own = isinstance(errors, ValidationError)  # and may be about a key called `path`
    raw = errors.errors(include_url=False) if isinstance(errors, ValidationError) else errors
    items = []
    for error in raw:
        parts = [str(part) for part in error["loc"] if not str(part).startswith("<")]
        if not is_own and parts and parts[0] in ("body", "query", "path", "header"):
            parts = parts[1:]
        if error["type"].startswith(UNKNOWN_VARIANT):
            parts.append(error["type"].removeprefix(UNKNOWN_VARIANT))
        message = "Unknown key" if error["type"] == "extra_forbidden" else error["msg"]
        items.append({"loc": ".".join(parts), "message": message})
    return items
