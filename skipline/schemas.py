"""What the service answers: one class a document, shared by the API and the client."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, PlainSerializer


def _to_utc_z(value: datetime) -> str:
    return value.isoformat(timespec="milliseconds").replace("+00:00", "Z")


Time = Annotated[AwareDatetime, PlainSerializer(_to_utc_z, return_type=str, when_used="json")]
"""UTC, ISO 8601 with milliseconds, ending in Z."""


class Document(BaseModel):
    """Base of all answers. A client ignores keys that a newer server adds."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class JobKind(StrEnum):
    """What a job does."""

    train = "train"
    evaluate = "evaluate"
    predict = "predict"
    ingest = "ingest"
    import_ = "import"
    dry_run = "dry_run"
    """Has the spec of a training; measures what it would cost."""


ExportFormat = Literal["safetensors", "onnx", "torchscript", "torch_export"]
"""Of a model in a single file."""


class JobStatus(StrEnum):
    """The states of a job; `shared.lifecycle` says who moves it between them."""

    queued = "queued"
    """Stored, waiting for a worker's slot."""
    running = "running"
    """Owned by one attempt of one worker."""
    pausing = "pausing"
    """Asked to pause; its worker writes a checkpoint."""
    paused = "paused"
    """Holds no worker; resuming queues it again."""
    stopping = "stopping"
    """Asked to end early and keep the result."""
    cancelling = "cancelling"
    """Asked to end and give up the result."""
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """True once the status will never change again."""
        return self in (JobStatus.succeeded, JobStatus.failed, JobStatus.cancelled)


class Progress(Document):
    """How far a job is. For an ingest, a step is an image and there is one epoch."""

    step: int
    num_steps: int
    epoch: int
    num_epochs: int
    eta_seconds: float | None = None
    images_per_second: float | None = None


class JobError(Document):
    """Why a job failed: a stable word, what happened, what to do next."""

    code: str
    message: str
    hint: str


class Job(Document):
    """A job as it stands. `spec` is resolved: every default is written out.

    `queue_position`: 1 for the next one to run; null for a job that does not wait for a worker,
    also for one that waits for another job. `dataset_id`: the dataset that its spec's name stands
    for, once that is known; it follows from the images, so it tells for ever which they are.
    `estimated_start_at`: by the measured speed of jobs
    like those before it; null where none was measured yet, or no worker is there.
    """

    id: str
    kind: JobKind
    name: str | None
    status: JobStatus
    spec: dict[str, Any]
    dataset_id: str | None = None
    attempt: int
    progress: Progress | None
    queue_position: int | None
    estimated_start_at: Time | None = None
    created_at: Time
    started_at: Time | None
    finished_at: Time | None
    result: dict[str, Any] | None
    error: JobError | None
    stop_reason: Literal["user", "early_stopping", "time_budget"] | None
    parent_id: str | None


class Attempt(Document):
    """One try of a worker at a job. `outcome` says how it ended (null while it lasts): its job's
    final status, `paused`, `released` by a worker that left, or `lost` in a crash. `gpus` are the
    numbers of the worker's GPUs that it used."""

    number: int
    host: str
    gpus: list[int]
    started_at: Time
    ended_at: Time | None
    outcome: Literal["succeeded", "failed", "cancelled", "paused", "released", "lost"] | None
    reason: str | None


class WorkerDevice(Document):
    """A GPU, or the processor with its cores. `job_id`: whose GPU it is now."""

    type: Literal["cpu", "cuda"]
    index: int
    name: str
    memory_bytes: int | None
    job_id: str | None = None


class Worker(Document):
    """A worker process. `lost`: not seen for a minute. `draining`: gives its jobs back and leaves.
    `num_slots`: jobs that it runs at once."""

    id: str
    host: str
    status: Literal["active", "draining", "lost"]
    num_slots: int
    num_cores: int
    devices: list[WorkerDevice]
    job_ids: list[str]
    started_at: Time
    seen_at: Time


ItemT = TypeVar("ItemT")


class Page(Document, Generic[ItemT]):
    """A part of a list; `next` goes into `?after=` and is null at the end."""

    items: list[ItemT]
    next: str | None


class MetricPoint(Document):
    """One value of a series. `step` counts optimizer steps from 1 over the whole job."""

    step: int
    epoch: int
    value: float
    time: Time


class Metrics(Document):
    """The series of a job by name. `next` is the number of the last point: `?after=` takes it."""

    job_id: str
    status: JobStatus
    series: dict[str, list[MetricPoint]]
    next: str | None


class StreamEvent(Document):
    """Base of what a stream carries. `id` is the event's number within its job; it travels beside
    the data, and a reader that comes back with it as `Last-Event-ID` misses nothing."""

    id: Annotated[int | None, Field(exclude=True)] = None


class MetricEvent(StreamEvent, MetricPoint):
    """A live point, as `event: metric` carries it."""

    name: str
    attempt: int


class RewindEvent(StreamEvent):
    """`event: rewind`: drop the points after `step`, attempt `attempt` writes them anew."""

    step: int
    attempt: int


class EndEvent(StreamEvent):
    """`event: end`: nothing will follow."""

    status: JobStatus


class Event(Document):
    """Something that happened to a job; `id` is its number within the job, from 1."""

    id: int
    time: Time
    level: Literal["info", "warning", "error"]
    type: str
    message: str
    data: dict[str, Any]


class Checkpoint(Document):
    """A stored state of a model; its id can be used wherever a model is asked for."""

    id: str
    kind: Literal["best", "last", "epoch"]
    epoch: int
    step: int
    metrics: dict[str, float]
    num_bytes: int
    created_at: Time


class Model(Document):
    """A model under the name by which it is served. `number` counts the moves of the alias;
    `former_checkpoint_id` is what taking the last one back leads to."""

    alias: str
    checkpoint_id: str
    former_checkpoint_id: str | None
    job_id: str
    arch: str
    dataset: str
    dataset_id: str | None
    epoch: int
    step: int
    metrics: dict[str, float]
    num_bytes: int
    notes: str
    tags: list[str]
    number: int
    moved_at: Time


class LoadedModel(Document):
    """A checkpoint in the memory of the process that answered. `backend`: what computes its
    answers; `num_bytes`: of its weights."""

    checkpoint_id: str
    arch: str
    backend: Literal["torch", "onnxruntime"] = "torch"
    num_bytes: int
    loaded_at: Time
    used_at: Time


class LoadedModels(Document):
    """The one that was used last comes first. `max_bytes` is what they may take together."""

    items: list[LoadedModel]
    num_bytes: int
    max_bytes: int


class AliasMove(Document):
    """A line of an alias's history; without a checkpoint, the alias was deleted. `submitter` is a
    digest of the key that did it, empty where the server asks for none."""

    number: int
    checkpoint_id: str | None
    job_id: str | None
    submitter: str
    created_at: Time


Interval = tuple[float, float]
"""Of 95 % confidence."""


class ClassReport(Document):
    """One class of a report. `accuracy` equals recall; precision and f1 are 0 where undefined."""

    label: str
    num_samples: int
    accuracy: float
    accuracy_interval: Interval | None = None
    precision: float
    recall: float
    f1: float


class JudgedImage(Document):
    """An image, and what was said of it. `image`: its path as it was brought in; `split` and
    `index`: where `GET /datasets/{id}/images/{split}/{index}` finds it."""

    image: str
    split: str
    index: int
    label: str
    predicted: str
    confidence: float
    loss: float


class ConfusedPair(Document):
    """A class that was called another: `num_images` of it, `share` of its images; the hardest of
    them are shown."""

    label: str
    predicted: str
    num_images: int
    share: float
    images: list[JudgedImage]


class ReliabilityBin(Document):
    """The images whose answers have a probability above `lower` and at most `upper`: how many, how
    sure the network was of them in the mean, and how often it was right."""

    lower: float
    upper: float
    num_images: int
    confidence: float
    accuracy: float


class Calibration(Document):
    """How far probabilities can be believed. `ece`: the expected calibration error;
    `calibrated_ece`: with logits divided by `temperature`, which was fitted to the same images.
    `reject_below`: the probability, at that temperature, which 95 % of the right answers reach;
    null without a right answer, and in reports of older versions."""

    ece: float
    temperature: float
    calibrated_ece: float
    reject_below: float | None = None
    bins: list[ReliabilityBin]


class Report(Document):
    """What an evaluation found. `confusion[i][j]`: images of class i that were called j.

    `top5` counts the best min(5, num_classes) answers. `selected_on` names the split that chose
    the checkpoint, for reports at the end of a training. `hardest`: the images with the highest
    loss; `confused`: the most frequent mistakes. Reports of older versions lack what has a default.
    """

    dataset: str
    dataset_id: str
    split: Literal["train", "val", "test"]
    selected_on: Literal["val", "test"] | None = None
    checkpoint_id: str | None = None
    num_samples: int
    loss: float
    top1: float
    top1_interval: Interval | None = None
    top5: float
    mean_class_accuracy: float
    per_class: list[ClassReport]
    confusion: list[list[int]]
    calibration: Calibration | None = None
    hardest: list[JudgedImage] = []
    confused: list[ConfusedPair] = []


class ComparedModel(Document):
    """One of two models."""

    checkpoint_id: str
    job_id: str
    arch: str
    epoch: int


class ClassComparison(Document):
    """A class that images were there of; `difference` is b's accuracy less a's."""

    label: str
    num_samples: int
    accuracy_a: float
    accuracy_b: float
    difference: float


class FlippedImage(Document):
    """An image that one of the models has right; `GET /datasets/{id}/images/{split}/{index}` finds
    it."""

    split: str
    index: int
    label: str
    called_a: str
    called_b: str


class Comparison(Document):
    """Two models on the same images. `difference`: b's top-1 less a's. `p_value`: of McNemar's
    exact test; small where chance alone would hardly make such a difference. `num_lost`: images
    that a has right and b wrong; `num_gained`: the other way round; the first 100 of each are in
    `lost` and `gained`. `agreement`: the share of images that both call the same."""

    a: ComparedModel
    b: ComparedModel
    dataset: str
    dataset_id: str
    split: Literal["train", "val", "test"]
    num_samples: int
    top1_a: float
    top1_b: float
    difference: float
    difference_interval: Interval
    p_value: float
    num_lost: int
    num_gained: int
    agreement: float
    per_class: list[ClassComparison]
    lost: list[FlippedImage]
    gained: list[FlippedImage]


class LayerSummary(Document):
    """One layer of a network; `output_shape` is that of one image: [K, h, w] or [K]."""

    name: str
    type: str
    output_shape: list[int]
    num_parameters: int


class Summary(Document):
    """A network, layer by layer in the order in which an image passes them.

    `multiply_adds`: of convolutions and linear layers, for one image. `forward_bytes`: the outputs
    of all layers for one image in float32, about what a step of training keeps of each image.
    """

    layers: list[LayerSummary]
    num_parameters: int
    num_trainable_parameters: int
    multiply_adds: int
    forward_bytes: int


class SplitInfo(Document):
    """`per_class` follows the order of the dataset's `classes`."""

    num_images: int
    per_class: list[int]


class Problem(Document):
    """Something found while a dataset was read; `examples` are paths within it."""

    code: str
    level: Literal["warning", "error"]
    message: str
    count: int
    examples: list[str]


class Dataset(Document):
    """An immutable dataset. `image_size` is what training uses by default, in pixels;
    `channel_mean` and `channel_std` are of all pixels of the training split, scaled to [0, 1];
    `channel_image_std` is the mean of its images' own deviations. That and `image_sizes` are
    unknown of a dataset that was brought in before they were measured. `labels`: the names it was
    given, as `name:version`, the newest first. `dropped_at`: when its images were deleted though
    models depend on it; it cannot be trained on any more."""

    id: str
    name: str
    hash: str
    num_classes: int
    classes: list[str]
    splits: dict[str, SplitInfo]
    image_size: int
    channel_mean: list[float]
    channel_std: list[float]
    channel_image_std: list[float] | None = None
    image_sizes: ImageSizes | None = None
    problems: list[Problem]
    num_bytes: int
    labels: list[str]
    created_at: Time
    dropped_at: Time | None = None


class ImageSize(Document):
    """A size in pixels, and how many images have it."""

    width: int
    height: int
    num_images: int


class Spread(Document):
    """How a number is spread over images: the smallest, the quartiles, the largest."""

    min: int
    p25: int
    median: int
    p75: int
    max: int


class ImageSizes(Document):
    """How large a dataset's images are, all splits together, in pixels and bytes of their files;
    `most_common`: up to ten sizes, the most frequent first."""

    width: Spread
    height: Spread
    file_bytes: Spread
    num_distinct: int
    most_common: list[ImageSize]


class DatasetImage(Document):
    """An image of a dataset: `index` is its place within its split. `image_url` answers the file
    as it was brought in, `thumbnail_url` a small PNG."""

    split: str
    index: int
    label: str
    path: str
    num_bytes: int
    image_url: str
    thumbnail_url: str


class Upload(Document):
    """A file that is sent in parts: `offset` of its `num_bytes` have come. What is not taken up
    again until `expires_at` is deleted. `job_id`: the job that reads it."""

    id: str
    file_name: str
    num_bytes: int
    offset: int
    created_at: Time
    expires_at: Time
    job_id: str | None = None


class BuiltinDataset(Document):
    """A dataset that the service knows by name and brings in when it is first used."""

    name: str
    num_classes: int
    image_size: int
    splits: dict[str, int]
    description: str
    needs_network: bool


class DatasetPage(Page[Dataset]):
    """The stored datasets, and those that can be had by name."""

    builtin: list[BuiltinDataset]


class Architecture(Document):
    """A network that can be asked for. `min_image_size`: by stem, in pixels."""

    name: str
    family: Literal["resnet", "vgg"]
    depth: int
    batch_norm: bool
    min_image_size: dict[str, int]
    description: str


class Recipe(Document):
    """A named training. `spec` holds the keys that it sets; all others have their defaults, and
    what a request gives beside `recipe` wins."""

    name: str
    description: str
    source: str
    dataset: str
    spec: dict[str, Any]


class LabelProbability(Document):
    """A class with its probability in [0, 1]; `index` is its place in the model's classes."""

    label: str
    index: int
    probability: float


class ImagePrediction(Document):
    """The answer for one image; `image` is its file name or its place in the request. `unknown`:
    the confidence is below the model's `reject_below`. Where they were asked for: `explanation`, a
    PNG in Base64 that shows where in the image the answer comes from, and `features`, the means of
    the network's last feature map."""

    image: str
    top: list[LabelProbability]
    confidence: float
    unknown: bool = False
    explanation: str | None = None
    features: list[float] | None = None


class PredictingModel(Document):
    """The checkpoint that answered. `temperature` and `reject_below` are those of its training's
    report, by which probabilities are calibrated and answers are unknown; null while there is none,
    and for another checkpoint than the one reported on."""

    checkpoint_id: str
    job_id: str
    arch: str
    epoch: int
    step: int
    temperature: float | None = None
    reject_below: float | None = None


class BatchPrediction(Document):
    """What a batch prediction says of an image. `image`: its path in the dataset or archive; in a
    dataset also its `split`, its `index` there and the `label` that it has. Of a file that is no
    image, or a damaged one, `error` says so, and there is no answer."""

    image: str
    split: str | None = None
    index: int | None = None
    label: str | None = None
    top: list[LabelProbability] = []
    confidence: float | None = None
    unknown: bool | None = None
    error: str | None = None


class BatchPredictions(Document):
    """`GET /jobs/{id}/predictions`: of every image, in the order of the dataset or archive."""

    model: PredictingModel
    predictions: list[BatchPrediction]


class ModelOrigin(Document):
    """What a file that a model was exported to says of it: where it comes from and how its answers
    are calibrated, and the report on it, if there is one."""

    model: PredictingModel
    report: Report | None = None


class Predictions(Document):
    """`POST /predict`. `timing_ms`: decode, queue, load and forward, in milliseconds."""

    model: PredictingModel
    predictions: list[ImagePrediction]
    timing_ms: dict[str, float]


class ErrorItem(Document):
    """One thing wrong with the input; `loc` is the full key, such as `optimizer.lr`."""

    loc: str
    message: str


class ProblemDocument(Document):
    """RFC 9457: what every error answers, as `application/problem+json`."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    errors: list[ErrorItem] = Field(default_factory=list)


class Readiness(Document):
    """`checks` names each dependency: `ok`, or what is wrong with it."""

    status: Literal["ready", "not_ready"]
    checks: dict[str, str]
