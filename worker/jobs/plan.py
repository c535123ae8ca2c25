"""All that a process needs to know to train a job, small enough to be sent to it.

Made once by the trainer, carried out by it or by each of its ranks. Holds names and sizes, no
images and no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from torch import nn

from shared.errors import TrainingError
from shared.lifecycle import Fence
from shared.settings import Settings
from shared.storage import Storage
from shared.vision.bundle import Bundle, BundleDataset, read_bundle
from shared.vision.preprocessing import Preprocessing
from shared.vision.transfer import imagenet_weights, start_from
from skipline.catalog import ARCHITECTURES, selection_split
from skipline.specs import IMAGENET_WEIGHTS, TrainSpec
from worker.datasets.files import FileDataset
from worker.datasets.packing import PackedDataset
from worker.datasets.splits import split_train
from worker.engine.data import ArrayData, FileData, SplitData
from worker.engine.distributed import ALONE, Ranks
from worker.engine.events import Control, Sink, TrainingCheckpoint
from worker.engine.learner import part_size
from worker.engine.measure import Measurement, measure
from worker.engine.resume import RESUME_FILE, load_resume
from worker.engine.runtime import Runtime
from worker.engine.trainer import FitResult, Resume, fit, new_model
from worker.sink import DatabaseSink

Images = PackedDataset | FileDataset
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Plan:
    """A training, resolved down to files.

    `accumulate_steps`: the spec's, or more where memory ran out.
    `resume_key`, `init_key`: in the storage, of the checkpoint to go on from and of the one to
    start from. `weights_folder`: where torchvision's weights are kept.
    """

    spec: TrainSpec
    fence: Fence
    dataset: BundleDataset
    classes: tuple[str, ...]
    images: Images
    preprocessing: Preprocessing
    runtime: Runtime
    accumulate_steps: int
    num_loaders: int
    weights_folder: Path
    resume_key: str | None = None
    init_key: str | None = None

    def describe(self, checkpoint: TrainingCheckpoint) -> Bundle:
        """What the bundle of a checkpoint says."""
        return Bundle(
            spec=self.spec,
            classes=self.classes,
            preprocessing=self.preprocessing,
            dataset=self.dataset,
            epoch=checkpoint.epoch,
            step=checkpoint.step,
            metrics=dict(checkpoint.metrics),
        )

    def prepare(self, sink: DatabaseSink, settings: Settings) -> None:
        """Tells the sink what it has to know of checkpoints."""
        sink.describe = self.describe
        sink.keep = self.spec.checkpoint
        sink.reserved_disk_bytes = settings.reserved_disk_bytes

    def data(self) -> tuple[SplitData, SplitData]:
        """The images to train on and those that select the best checkpoint.

        Raises:
            TrainingError: `val_fraction_too_large`.
        """
        spec = self.spec
        if spec.val_fraction is None:
            split = selection_split(spec, self.images.counts)
            return self._split("train"), self._split(split)
        labels = self._split("train").labels
        train_rows, val_rows = split_train(np.asarray(labels), spec.val_fraction, spec.seed)
        if not len(val_rows):
            raise TrainingError(
                "val_fraction_too_large",
                "Every class has a single image, so none can be held out",
                "Add images to the dataset, or a split val",
            )
        return self._split("train", train_rows), self._split("train", val_rows)

    def _split(self, name: str, rows: npt.NDArray[np.int64] | None = None) -> SplitData:
        return split_data(self.images, name, self.num_loaders, rows)

    def new_model(self, storage: Storage) -> nn.Module:
        """The network before its first step.

        Raises:
            TrainingError: `weights_do_not_fit`, `download_failed`, `weights_damaged`.
            CheckpointCorrupt: the checkpoint to start from is damaged.
        """
        model = new_model(self.spec, len(self.classes))
        init_from = self.spec.model.init_from
        if init_from is None or self.resume_key is not None:
            return model
        arch = self.spec.model.arch
        if init_from == IMAGENET_WEIGHTS:
            weights = imagenet_weights(arch, self.weights_folder)
        else:
            assert self.init_key is not None, "resolved when the job was stored"
            weights = read_bundle(storage.path(self.init_key))[1]
        start_from(model, weights, ARCHITECTURES[arch].parts[-1])
        return model

    def resume(self, storage: Storage) -> Resume | None:
        """What the checkpoint to go on from holds. Raises `CheckpointCorrupt`."""
        if self.resume_key is None:
            return None
        folder = storage.path(self.resume_key)
        return Resume(read_bundle(folder)[1], load_resume(folder / RESUME_FILE))

    def with_smaller_parts(self) -> Plan | None:
        """The same with micro-batches of half the size; None when they cannot be halved."""
        num_images = self.spec.batch_size // self.runtime.num_processes
        unit = self.spec.part_unit
        if part_size(num_images, self.accumulate_steps, unit) <= unit:
            return None
        return replace(self, accumulate_steps=2 * self.accumulate_steps)

    @property
    def learnt_spec(self) -> TrainSpec:
        """The spec with as many parts of a batch as memory takes."""
        return self.spec.model_copy(update={"accumulate_steps": self.accumulate_steps})


def split_data(
    images: Images, name: str, num_loaders: int, rows: npt.NDArray[np.int64] | None = None
) -> SplitData:
    """A split as the engine takes it; `rows` (int64 [N]) of it, or all."""
    if isinstance(images, PackedDataset):
        return ArrayData(*images.split(name), rows)
    return FileData(images.split(name), num_loaders, rows)


Work = Callable[[Plan, Storage, Sink, Control, Ranks], T_co]
"""What is done with a plan, in one process or in each of several. Named functions only: it is sent
to other processes."""


def fit_plan(
    plan: Plan, storage: Storage, sink: Sink, control: Control, ranks: Ranks = ALONE
) -> FitResult:
    """Trains as planned. Raises as `worker.engine.trainer.fit` and `Plan.new_model`."""
    train, val = plan.data()
    return fit(
        plan.learnt_spec,
        plan.new_model(storage),
        train,
        val,
        plan.preprocessing,
        plan.runtime,
        sink,
        control,
        plan.resume(storage),
        ranks,
    )


def measure_plan(
    plan: Plan, storage: Storage, sink: Sink, control: Control, ranks: Ranks = ALONE
) -> Measurement:
    """What carrying the plan out would take. Raises as `fit_plan`."""
    train, val = plan.data()
    return measure(
        plan.learnt_spec,
        plan.new_model(storage),
        train,
        val,
        plan.preprocessing,
        plan.runtime,
        sink,
        control,
        ranks,
    )
