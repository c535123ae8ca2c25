"""Answers for all images of a dataset, or of an archive: those that `POST /predict` gives."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sqlalchemy.orm import Session

from shared import datasets, lifecycle, repository, uploads
from shared.answers import answers, predicting_model
from shared.dataset_files import IMAGES_FILE
from shared.errors import BadImage, ImageTooLarge, TrainingError
from shared.images import decode_image, to_square
from shared.tables import Checkpoint
from shared.vision.predictor import Predictor
from skipline.catalog import SpecRefused, check_prediction
from skipline.schemas import BatchPrediction, ImagePrediction, JobStatus, PredictingModel
from skipline.specs import PredictSpec
from worker.datasets.archives import open_archive
from worker.datasets.disk import full_disk_is_reported
from worker.datasets.files import FileDataset
from worker.datasets.layout import LooseFiles
from worker.datasets.parallel import batched, decode_threads, map_ordered
from worker.datasets.sources import upload_path
from worker.engine.runtime import Runtime, typed_failures
from worker.jobs.context import Context
from worker.jobs.datasets import dataset_of, images_of
from worker.jobs.evaluation import bundle_of, model_of
from worker.jobs.runtime import prediction_runtime

JSON_FILE, CSV_FILE = "predictions.json", "predictions.csv"
NUM_COUNTED = 100
"""Classes of which a job's result says how often they were the answer."""
MAX_SQUARE_BYTES = 64 * 2**20
"""Of a batch."""


@dataclass(frozen=True, slots=True)
class Image:
    """One to answer for: what is known of it, and the bytes of its file."""

    facts: BatchPrediction
    data: bytes


@dataclass(frozen=True)
class Images:
    """Where the images come from. `num_bytes`: of all files."""

    num_images: int
    num_bytes: int
    read: Iterator[Image]


@dataclass(frozen=True, slots=True)
class Decoded:
    """uint8 [S, S, 3], or None where `facts` says why there is no picture."""

    facts: BatchPrediction
    square: npt.NDArray[np.uint8] | None


def predict(context: Context, spec: PredictSpec) -> None:
    """Writes the answers as JSON and as CSV."""
    checkpoint = model_of(context, spec.model)
    bundle, weights = bundle_of(context, checkpoint)
    images = _images(context, spec, bundle.preprocessing.image_size)
    runtime = prediction_runtime(context, spec)
    with context.database.read_scope() as session:
        model, _ = predicting_model(session, checkpoint)
    key = f"jobs/{context.fence.job_id}/{context.fence.attempt}/predictions"
    with (
        full_disk_is_reported("the predictions"),
        context.storage.writing(key, context.fence.owner) as folder,
        typed_failures(),
        Results(folder, model, min(spec.top_k, len(bundle.classes))) as results,
    ):
        predictor = Predictor(bundle, weights, runtime.device)
        _answer_all(context, predictor, images, results, runtime)
    _succeed(context, spec, checkpoint, key, results)


def _images(context: Context, spec: PredictSpec, image_size: int) -> Images:
    """Raises `TrainingError`: with the code of what is wrong with the dataset or the archive."""
    if spec.upload_id is not None:
        path = upload_path(context.settings, spec.upload_id)
        source = open_archive(path, context.settings, lambda listing: LooseFiles())
        found = (Image(BatchPrediction(image=image.path), image.data) for image in source)
        return Images(source.num_images, source.num_bytes, found)
    assert spec.dataset is not None, "the spec has one source"
    dataset = dataset_of(context, spec.dataset)
    with context.database.read_scope() as session:
        facts, _ = datasets.dataset_facts(session, dataset.id)
    try:
        check_prediction(spec, facts)
    except SpecRefused as error:
        hint = "Name one of these splits, or none for all of them"
        raise TrainingError(error.code, error.items[0]["message"], hint) from None
    stored = images_of(context, dataset, image_size, "files")
    assert isinstance(stored, FileDataset), "these were asked for"
    splits: list[str] = [spec.split] if spec.split else list(stored.counts)
    sizes = [stored.index.splits[split].sizes for split in splits]
    num_bytes = int(sum(column.sum() for column in sizes))
    return Images(sum(map(len, sizes)), num_bytes, _stored_images(stored, splits))


def _stored_images(stored: FileDataset, splits: list[str]) -> Iterator[Image]:
    with (stored.folder / IMAGES_FILE).open("rb") as file:
        for split in splits:
            index = stored.index.splits[split]
            for row, path in enumerate(index.paths):
                facts = BatchPrediction(
                    image=path, split=split, index=row, label=stored.classes[index.labels[row]]
                )
                size, offset = int(index.sizes[row]), int(index.offsets[row])
                yield Image(facts, os.pread(file.fileno(), size, offset))


def _answer_all(
    context: Context, predictor: Predictor, images: Images, results: Results, runtime: Runtime
) -> None:
    size = predictor.bundle.preprocessing.image_size
    max_pixels = context.settings.max_image_pixels

    def decode(image: Image) -> Decoded:
        try:
            return Decoded(image.facts, to_square(decode_image(image.data, max_pixels), size))
        except (BadImage, ImageTooLarge) as error:
            told = {"error": error.detail}
            return Decoded(image.facts.model_copy(update=told), None)

    mean_bytes = images.num_bytes / max(images.num_images, 1)
    num_threads = decode_threads(mean_bytes, runtime.num_threads)
    decoded = map_ordered(decode, images.read, num_threads)
    with closing(decoded):
        for batch in batched(decoded, lambda item: size * size * 3, MAX_SQUARE_BYTES):
            context.control.check()
            squares = [item.square for item in batch if item.square is not None]
            shares = predictor.predict(np.stack(squares)) if squares else None
            results.add([item.facts for item in batch], shares, predictor.bundle.classes)
            context.show_images(results.num_images, images.num_images)


def _succeed(
    context: Context, spec: PredictSpec, checkpoint: Checkpoint, key: str, results: Results
) -> None:
    """The answers, the result and the status become visible together. Of an upload nothing is left
    then."""
    result: dict[str, Any] = {
        "checkpoint_id": checkpoint.id,
        "num_images": results.num_images,
        "num_unreadable": results.num_unreadable,
        "num_unknown": results.num_unknown,
        "counts": dict(results.counts.most_common(NUM_COUNTED)),
    }

    def write(session: Session) -> None:
        repository.add_predictions(session, context.fence, key)
        if spec.upload_id is not None:
            uploads.forget(session, spec.upload_id)
        lifecycle.finish(session, context.fence, JobStatus.succeeded, result=result)

    context.sink.finish(write)
    if spec.upload_id is not None:
        uploads.remove_files(context.storage.root, spec.upload_id)


class Results:
    """The two files, written image by image.

    The JSON is a `skipline.schemas.BatchPredictions`, one image to a line; the CSV is as RFC 4180
    has it, with a class and its probability for each of the `top_k`.
    """

    def __init__(self, folder: Path, model: PredictingModel, top_k: int) -> None:
        self._folder = folder
        self._model = model
        self._top_k = top_k
        self.num_images = self.num_unreadable = self.num_unknown = 0
        self.counts: Counter[str] = Counter()
        """How often each class was the answer."""

    def __enter__(self) -> Self:
        self._json = (self._folder / JSON_FILE).open("w", encoding="utf-8")
        self._json.write(f'{{"model":{self._model.model_dump_json()},"predictions":[')
        self._csv = (self._folder / CSV_FILE).open("w", encoding="utf-8", newline="")
        self._table = csv.writer(self._csv)
        ranks = range(1, self._top_k + 1)
        columns = [f"{name}_{rank}" for rank in ranks for name in ("class", "probability")]
        self._table.writerow(["image", "split", "index", "label", "unknown", "error", *columns])
        return self

    def add(
        self,
        images: list[BatchPrediction],
        probabilities: npt.NDArray[np.float32] | None,
        classes: tuple[str, ...],
    ) -> None:
        """Images in their order; `probabilities` float32 [B, num_classes] of those without an
        error."""
        readable = [image for image in images if image.error is None]
        found: Iterator[ImagePrediction] = iter(())
        if probabilities is not None:
            names = [image.image for image in readable]
            found = iter(answers(self._model, names, probabilities, classes, self._top_k))
        for image in images:
            if image.error is None:
                answer = next(found)
                keys = ("top", "confidence", "unknown")
                image = image.model_copy(update={key: getattr(answer, key) for key in keys})
            self._write(image)

    def _write(self, image: BatchPrediction) -> None:
        self._json.write(",\n" if self.num_images else "\n")
        self._json.write(image.model_dump_json())
        best = [value for row in image.top for value in (row.label, row.probability)]
        best += [""] * (2 * self._top_k - len(best))
        known = (image.image, image.split, image.index, image.label)
        unknown = None if image.unknown is None else json.dumps(image.unknown)
        self._table.writerow([*known, unknown, image.error, *best])
        self.num_images += 1
        self.num_unreadable += image.error is not None
        self.num_unknown += image.unknown is True
        if image.top:
            self.counts[image.top[0].label] += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._json, self._csv:
            self._json.write("\n]}\n")
