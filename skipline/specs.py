"""What a client may ask for: the specs of training, evaluation and ingest jobs.

Specs are frozen, refuse unknown keys and non-finite numbers, and check whatever can be checked
without knowing the dataset. What needs facts (does the stem fit this dataset's images?) is
checked by `skipline.catalog.resolve`. This file knows nothing of torch, SQL or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

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
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Epochs = Annotated[int, Field(ge=1, le=10_000)]

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
VGGS = ("vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn")
ARCHS = RESNETS + VGGS


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
        custom_error_type="unknown_variant",
        custom_error_message="Unknown {key}; choose one of: {names}",
        custom_error_context={"key": key, "names": ", ".join(names)},
    )


class ModelSpec(Spec):
    """The network. `stem` of a ResNet: `small` is a 3x3 convolution with stride 1 and no pooling,
    `imagenet` the 7x7 with stride 2 and a max pool; `auto` takes `small` up to 64 px."""

    arch: Annotated[str, _known(*ARCHS)] = "resnet18"
    stem: Literal["auto", "small", "imagenet"] = "auto"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class SGD(Spec):
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


class _AdamParameters(Spec):
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


SchedulerSpec = Annotated[
    Annotated[Constant, Tag("<constant>")]
    | Annotated[Cosine, Tag("<cosine>")]
    | Annotated[Step, Tag("<step>")]
    | Annotated[Plateau, Tag("<plateau>")],
    _choose_by("name", "cosine", "cosine", "step", "plateau", "constant"),
]


class LossSpec(Spec):
    """Cross-entropy; `label_smoothing` spreads that share of the target over all classes."""

    name: Annotated[str, _known("cross_entropy")] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class CheckpointSpec(Spec):
    """When to write checkpoints and how many to keep.

    `keep_best` by `monitor`, `keep_last` by age; one is written every `every_epochs` epochs, and
    within an epoch when the last is older than `every_minutes`.
    """

    keep_best: Annotated[int, Field(ge=1, le=100)] = 1
    keep_last: Annotated[int, Field(ge=1, le=100)] = 1
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


class ResourcesSpec(Spec):
    """Where the job runs; `auto` takes a CUDA GPU if the worker has one, else the CPU."""

    device: Literal["auto", "cpu", "cuda"] = "auto"


AugmentName = Literal["random_crop", "horizontal_flip"]


class TrainSpec(Spec):
    """A training. Stored specs are resolved: no default is left to the reader's imagination."""

    kind: Literal["train"] = "train"
    spec_version: Literal[1] = SPEC_VERSION
    name: Label | None = None
    tags: Annotated[tuple[Label, ...], Field(max_length=20)] = ()
    dataset: Reference
    model: ModelSpec = ModelSpec()
    image_size: Annotated[int, Field(ge=8, le=1024)] | None = None
    augment: Annotated[tuple[AugmentName, ...], Field(max_length=10)] = (
        "random_crop",
        "horizontal_flip",
    )
    normalize: Literal["dataset"] = "dataset"
    epochs: Epochs = 20
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 256
    val_fraction: Annotated[float, Field(gt=0, le=0.9)] | None = None
    optimizer: OptimizerSpec = SGD()
    scheduler: SchedulerSpec = Cosine()
    loss: LossSpec = LossSpec()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: bool = True
    deterministic: bool = False
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    checkpoint: CheckpointSpec = CheckpointSpec()
    log_every_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    resources: ResourcesSpec = ResourcesSpec()


class EvaluateSpec(Spec):
    """An evaluation of a stored model (a job's id means its best checkpoint) on a split;
    `split: null` takes `test`, else `val`."""

    kind: Literal["evaluate"] = "evaluate"
    spec_version: Literal[1] = SPEC_VERSION
    name: Label | None = None
    tags: Annotated[tuple[Label, ...], Field(max_length=20)] = ()
    model: Reference
    dataset: Reference
    split: Literal["train", "val", "test"] | None = None
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 256
    resources: ResourcesSpec = ResourcesSpec()


class IngestSpec(Spec):
    """Bringing a dataset in: a folder or archive of class folders on the server's disk, or a
    built-in by name. `val_fraction` holds out that share of `train` as `val`, class by class."""

    kind: Literal["ingest"] = "ingest"
    spec_version: Literal[1] = SPEC_VERSION
    source: Literal["path", "builtin"] = "path"
    name: Label | None = None
    path: Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_label)] | None = None
    val_fraction: Annotated[float, Field(gt=0, le=0.9)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0

    @model_validator(mode="after")
    def _source_is_complete(self) -> Self:
        if self.source == "path" and self.path is None:
            raise PydanticCustomError("missing_path", "source: path needs the key path")
        if self.source == "builtin" and (self.name is None or self.path is not None):
            raise PydanticCustomError("missing_name", "source: builtin needs name, and no path")
        return self


JobRequest = Annotated[
    Annotated[TrainSpec, Tag("<train>")] | Annotated[EvaluateSpec, Tag("<evaluate>")],
    _choose_by("kind", "train", "train", "evaluate"),
]
"""What `POST /jobs` takes."""

JobSpec = Annotated[
    Annotated[TrainSpec, Tag("<train>")]
    | Annotated[EvaluateSpec, Tag("<evaluate>")]
    | Annotated[IngestSpec, Tag("<ingest>")],
    _choose_by("kind", "train", "train", "evaluate", "ingest"),
]
"""What a stored job holds."""

AnySpec = TrainSpec | EvaluateSpec | IngestSpec

_request_adapter: TypeAdapter[TrainSpec | EvaluateSpec] = TypeAdapter(JobRequest)
_spec_adapter: TypeAdapter[AnySpec] = TypeAdapter(JobSpec)


def parse_request(document: Any) -> TrainSpec | EvaluateSpec:
    """Checks what a client sent to `POST /jobs`. Raises pydantic's `ValidationError`."""
    return _request_adapter.validate_python(document)


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
        if error["type"] == "unknown_variant":
            parts.append(error["ctx"]["key"])
        message = "Unknown key" if error["type"] == "extra_forbidden" else error["msg"]
        items.append({"loc": ".".join(parts), "message": message})
    return items
