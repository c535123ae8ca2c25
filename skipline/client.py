"""The Python client: every call of the HTTP interface as a method with a typed result.

Knows HTTP and the documents of `skipline.schemas`; nothing of the server's packages.
"""

from __future__ import annotations

import base64
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx2
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from skipline.catalog import EXPORT_SUFFIXES
from skipline.schemas import (
    AliasMove,
    Architecture,
    Attempt,
    BatchPredictions,
    Checkpoint,
    Comparison,
    Dataset,
    DatasetImage,
    DatasetPage,
    EndEvent,
    ErrorItem,
    Event,
    ExportFormat,
    Job,
    MetricEvent,
    Metrics,
    Model,
    Page,
    Predictions,
    ProblemDocument,
    Readiness,
    Recipe,
    Report,
    RewindEvent,
    Summary,
    Upload,
    Worker,
)
from skipline.specs import PRODUCTION, RequestSpec, TrainSpec
from skipline.uploading import Memory, Progress, Source, open_source, part_bytes

DocumentT = TypeVar("DocumentT", bound=BaseModel)
PageT = TypeVar("PageT", bound=Page[Any])
LiveEvent = MetricEvent | RewindEvent | EndEvent

EXPORT_SECONDS = 310.0
"""That a server may take to write a model, and a little more."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PAGE_SIZE = 100
LONGEST_PAUSE_SECONDS = 5.0
"""Between two tries to reach a server that is away, and between two looks at a waiting job."""
STREAM_SILENCE_SECONDS = 60.0
"""A stream without even a keep-alive for so long counts as dropped."""
METRIC_STREAM: Mapping[str, type[LiveEvent]] = {
    "metric": MetricEvent,
    "rewind": RewindEvent,
    "end": EndEvent,
}
EVENT_STREAM: Mapping[str, type[Event | EndEvent]] = {"event": Event, "end": EndEvent}
"""What each stream carries, by the name of its server-sent events."""


class ClientSettings(BaseSettings):
    """`SKIPLINE_API_URL` and `SKIPLINE_API_KEY`, from the environment or a file `.env`."""

    model_config = SettingsConfigDict(
        env_prefix="SKIPLINE_", env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True
    )

    api_url: str = "http://127.0.0.1:8000"
    api_key: SecretStr | None = None


class SkiplineError(Exception):
    """What the server refused, as its problem document says it.

    `code` is a stable word, `status` the HTTP status (None where no answer came), and `errors`
    name the keys of an input that is wrong.
    """

    def __init__(
        self,
        detail: str,
        *,
        code: str,
        status: int | None = None,
        errors: Sequence[ErrorItem] = (),
    ) -> None:
        super().__init__("; ".join([detail, *(f"{item.loc}: {item.message}" for item in errors)]))
        self.detail = detail
        self.code = code
        self.status = status
        self.errors = list(errors)


class ServerUnreachable(SkiplineError):
    """No answer from the server, or its connection broke. `may_have_arrived`: the request, so that
    the server may have done what it asked for."""

    def __init__(self, url: str, reason: str, *, may_have_arrived: bool = True) -> None:
        self.reason = reason
        self.may_have_arrived = may_have_arrived
        super().__init__(
            f"No Skipline server answers at {url} ({reason}). "
            "Start one with `skipline up`, or set SKIPLINE_API_URL to where it runs.",
            code="server_unreachable",
        )


class Patience:
    """How long to try again while a server is away: pauses that double, `seconds` in all."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.reset()

    def reset(self) -> None:
        """The server answered: the next failure is a first one."""
        self._pause = 0.1
        self._away_since: float | None = None

    def pause(self, error: SkiplineError) -> None:
        """Sleeps before the next try; raises `error` once the patience has run out."""
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
        left = self._seconds - (now - self._away_since)
        if left <= 0:
            raise error
        time.sleep(min(self._pause, left))
        self._pause = min(self._pause * 2, LONGEST_PAUSE_SECONDS)


class Skipline:
    """A connection to a Skipline server; close it, or use it in a `with` statement.

    Args:
        url: where the server is; by default `SKIPLINE_API_URL`.
        api_key: sent as `Authorization: Bearer`; by default `SKIPLINE_API_KEY`.
        timeout: seconds that one answer may take.
        patience: seconds for which streams and waits put up with a server that is away, and for
            which a request for a new job is sent again when its answer was lost.

    Every method raises `ServerUnreachable` when no answer comes, and `SkiplineError` for whatever
    else the server does not do.

    What makes a job takes an `idempotency_key`: the server makes one job of all requests with the
    same key, within 24 hours. Left out, it is random, and a lost answer makes no second job.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        patience: float = 60.0,
    ) -> None:
        settings = ClientSettings()
        self.url = (url or settings.api_url).rstrip("/")
        self.patience = patience
        self._timeout = timeout
        if api_key is None and settings.api_key is not None:
            api_key = settings.api_key.get_secret_value()
        self._http = self._connect(api_key)

    def _connect(self, api_key: str | None) -> httpx2.Client:
        try:
            url = httpx2.URL(self.url)
            if url.scheme not in ("http", "https") or not url.host:
                raise ValueError("it has to look like http://127.0.0.1:8000")
            return httpx2.Client(
                base_url=url,
                headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
                timeout=self._timeout,
                # A proxy set for the world outside cannot reach this machine's loopback.
                trust_env=url.host not in LOOPBACK,
            )
        except (httpx2.InvalidURL, ValueError) as error:
            raise SkiplineError(
                f"{self.url!r} is no address of a server: {error}", code="invalid_url"
            ) from None

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # Jobs.

    def train(
        self,
        spec: TrainSpec | Mapping[str, Any] | None = None,
        /,
        *,
        idempotency_key: str | None = None,
        **settings: Any,
    ) -> Job:
        """Starts a training: `train(dataset="digits", model={"arch": "resnet18"}, epochs=5)`, or
        `train(recipe="cifar10_resnet18")`.

        Takes a spec, keys of one, or both; single keys win.
        """
        return self.submit(_training(spec, settings), idempotency_key=idempotency_key)

    def dry_run(
        self,
        spec: TrainSpec | Mapping[str, Any] | None = None,
        /,
        *,
        idempotency_key: str | None = None,
        **settings: Any,
    ) -> Job:
        """As `train`, but only measures: the finished job's `result` says what the training would
        cost."""
        document = _training(spec, settings)
        return self.submit(document, dry_run=True, idempotency_key=idempotency_key)

    def evaluate(
        self,
        model: str,
        dataset: str,
        *,
        split: str | None = None,
        idempotency_key: str | None = None,
        **settings: Any,
    ) -> Job:
        """Starts the evaluation of a model (a job's or a checkpoint's id) on a dataset's split."""
        return self.submit(
            {"kind": "evaluate", "model": model, "dataset": dataset, "split": split, **settings},
            idempotency_key=idempotency_key,
        )

    def predict_all(
        self,
        source: str | os.PathLike[str] | None = None,
        *,
        dataset: str | None = None,
        model: str = PRODUCTION,
        progress: Progress = lambda sent, total: None,
        idempotency_key: str | None = None,
        **settings: Any,
    ) -> Job:
        """Starts a batch prediction: of a stored dataset, or of an archive or folder of images,
        which is sent. What it answered is in `predictions` then.

        Raises `OSError` for files that cannot be read, and `SourceChanged` for those that change
        meanwhile.
        """
        if (source is None) == (dataset is None):
            raise ValueError("predict_all takes either source or dataset")
        document = {"kind": "predict", "model": model, **settings}
        if source is None:
            document["dataset"] = dataset
        else:
            document["upload_id"] = self.upload(source, progress=progress).id
        return self.submit(document, idempotency_key=idempotency_key)

    def submit(
        self,
        document: RequestSpec | Mapping[str, Any],
        *,
        dry_run: bool = False,
        idempotency_key: str | None = None,
    ) -> Job:
        """Sends a whole job request. The job returned is stored and waits to be run."""
        body = dict(document) if isinstance(document, Mapping) else _as_written(document)
        query = {"dry_run": True} if dry_run else {}
        return self._new_job("jobs", idempotency_key, params=query, json=body)

    def job(self, job_id: str) -> Job:
        """The job as it stands."""
        return self._ask(Job, "GET", f"jobs/{_segment(job_id)}")

    def jobs(
        self, *, status: str | None = None, kind: str | None = None, limit: int | None = None
    ) -> Iterator[Job]:
        """The jobs, newest first as the server lists them; at most `limit`."""
        found = 0
        for page in self._pages(Page[Job], "jobs", {"status": status, "kind": kind}, limit):
            for job in page.items[: None if limit is None else limit - found]:
                found += 1
                yield job
            if found == limit:
                return

    def cancel(self, job_id: str) -> Job:
        """Asks a job to end and give up its result."""
        return self._act(job_id, "cancel")

    def pause(self, job_id: str) -> Job:
        """Asks a running job to write a checkpoint and leave its worker."""
        return self._act(job_id, "pause")

    def resume(self, job_id: str) -> Job:
        """Queues a paused job again; it goes on from its checkpoint."""
        return self._act(job_id, "resume")

    def stop(self, job_id: str) -> Job:
        """Asks a running training to end early and keep its result."""
        return self._act(job_id, "stop")

    def retry(
        self, job_id: str, *, from_start: bool = False, idempotency_key: str | None = None
    ) -> Job:
        """Does a failed or cancelled job again, as a new job with `parent_id`: from its last
        checkpoint where it has one, unless `from_start`."""
        query = {"from_start": True} if from_start else {}
        return self._new_job(f"jobs/{_segment(job_id)}/retry", idempotency_key, params=query)

    def delete(self, job_id: str) -> None:
        """Deletes a job that nobody works at, with all that it has made."""
        self._answer("DELETE", f"jobs/{_segment(job_id)}", expected=(204,))

    def wait(self, job_id: str) -> Job:
        """The job once its status will not change any more; outlasts restarts of the server, and
        pauses."""
        patience = Patience(self.patience)
        pause = 0.1
        while True:
            try:
                job = self.job(job_id)
            except ServerUnreachable as error:
                patience.pause(error)
                continue
            if job.status.is_terminal:
                return job
            patience.reset()
            time.sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE_SECONDS)

    # What a job has made.

    def metrics(
        self,
        job_id: str,
        *,
        names: Sequence[str] = (),
        after: str | None = None,
        max_points: int | None = None,
    ) -> Metrics:
        """The job's series. `after`: the `next` of an earlier answer, for what came since then."""
        query = {"names": ",".join(names) or None, "after": after, "max_points": max_points}
        return self._ask(Metrics, "GET", f"jobs/{_segment(job_id)}/metrics", params=query)

    def stream_metrics(self, job_id: str, last_event_id: int | None = None) -> Iterator[LiveEvent]:
        """The job's points as they come, from the start or from after `last_event_id`.

        Ends with an `EndEvent`. A connection that drops is taken up again where it broke, so that
        no point is lost or doubled. After a `RewindEvent` the points later than its step are void.
        """
        path = f"jobs/{_segment(job_id)}/metrics"
        return self._stream(path, METRIC_STREAM, last_event_id)

    def stream_events(
        self, job_id: str, last_event_id: int | None = None
    ) -> Iterator[Event | EndEvent]:
        """What happens to the job, as it happens, from the start or from after `last_event_id`.

        Ends with an `EndEvent`. A connection that drops is taken up again where it broke.
        """
        return self._stream(f"jobs/{_segment(job_id)}/events", EVENT_STREAM, last_event_id)

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """The stored states of the job's model."""
        pages = self._pages(Page[Checkpoint], f"jobs/{_segment(job_id)}/checkpoints")
        return [checkpoint for page in pages for checkpoint in page.items]

    def report(self, job_id: str) -> Report:
        """What an evaluation, or the end of a training, found."""
        return self._ask(Report, "GET", f"jobs/{_segment(job_id)}/report")

    def predictions(self, job_id: str) -> BatchPredictions:
        """What a batch prediction answered. For very many images, see `save_predictions`."""
        return self._ask(BatchPredictions, "GET", f"jobs/{_segment(job_id)}/predictions")

    def save_predictions(self, job_id: str, path: str | os.PathLike[str]) -> None:
        """Writes what a batch prediction answered to a file, as CSV where its name ends in `.csv`,
        else as JSON. The file is complete or not there. Raises `OSError` if it cannot be
        written."""
        target = Path(path)
        kind = "csv" if target.suffix.lower() == ".csv" else "json"
        media_type = "text/csv" if kind == "csv" else "application/json"
        answers = f"jobs/{_segment(job_id)}/predictions"
        self._save(answers, target, media_type, params={"format": kind})

    def summary(self, job_id: str) -> Summary:
        """The network of a training that has begun, layer by layer."""
        return self._ask(Summary, "GET", f"jobs/{_segment(job_id)}/summary")

    def events(self, job_id: str) -> list[Event]:
        """What happened to the job, in order."""
        pages = self._pages(Page[Event], f"jobs/{_segment(job_id)}/events")
        return [event for page in pages for event in page.items]

    def attempts(self, job_id: str) -> list[Attempt]:
        """The tries of workers at the job, in order."""
        pages = self._pages(Page[Attempt], f"jobs/{_segment(job_id)}/attempts")
        return [attempt for page in pages for attempt in page.items]

    def logs(self, job_id: str, attempt: int | None = None) -> str:
        """What the trainer of an attempt printed, of the last one unless told otherwise; as far as
        the server keeps it."""
        path = f"jobs/{_segment(job_id)}/logs"
        return self._content("text/plain", path, {"attempt": attempt}).text

    def plot(self, job_id: str, name: str) -> bytes:
        """A PNG: `loss`, `accuracy`, `lr`, `confusion` or `samples`."""
        path = f"jobs/{_segment(job_id)}/plots/{_segment(name)}.png"
        return self._content("image/png", path).content

    # Datasets, architectures, recipes, predictions, workers.

    def datasets(self) -> DatasetPage:
        """All stored datasets, and the built-in ones that can be asked for by name."""
        pages = list(self._pages(DatasetPage, "datasets"))
        items: list[Dataset] = [dataset for page in pages for dataset in page.items]
        return pages[0].model_copy(update={"items": items, "next": None})

    def dataset(self, reference: str) -> Dataset:
        """A stored dataset: by its id, by a label (`name:version`), or by a name, which stands for
        its newest version."""
        return self._ask(Dataset, "GET", f"datasets/{_segment(reference)}")

    def dataset_images(
        self, reference: str, *, split: str | None = None, label: str | None = None
    ) -> Iterator[DatasetImage]:
        """The images of a split (`train` by default), or those of one class, page by page."""
        path = f"datasets/{_segment(reference)}/images"
        for page in self._pages(Page[DatasetImage], path, {"split": split, "label": label}):
            yield from page.items

    def dataset_picture(
        self, reference: str, name: Literal["samples", "classes"], **query: Any
    ) -> bytes:
        """A PNG: some images with their labels (`split`, `label`, `seed`, `num_images`), or how
        many images each class has."""
        path = f"datasets/{_segment(reference)}/{name}.png"
        return self._content("image/png", path, query).content

    def delete_dataset(self, reference: str, *, force: bool = False) -> None:
        """Deletes a dataset under all its names. With `force`, also where models or jobs depend on
        it: its record stays for them, its images go."""
        params = {"force": True} if force else {}
        path = f"datasets/{_segment(reference)}"
        self._answer("DELETE", path, params=params, expected=(204,))

    def add_dataset(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        builtin: str | None = None,
        name: str | None = None,
        val_fraction: float | None = None,
        seed: int | None = None,
        upload: bool | None = None,
        progress: Progress = lambda sent, total: None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Starts bringing in a folder or archive of class folders, or a built-in by name; the
        finished job's `result["dataset_id"]` names the dataset.

        A server on this machine reads the path itself, if it may; any other gets the files sent, as
        `upload` says how. `upload` True sends them always; False never: then `path` is as the
        server sees it, and a relative one is taken from the working directory of this process.

        Raises `OSError` for files that cannot be read, and `SourceChanged` for those that change
        meanwhile.
        """
        if (path is None) == (builtin is None):
            raise ValueError("add_dataset takes either path or builtin")
        options = {"name": name, "val_fraction": val_fraction, "seed": seed}
        given = {key: value for key, value in options.items() if value is not None}
        if path is None:
            return self._bring_in({"source": "builtin", **given, "name": builtin}, idempotency_key)
        if not (self._is_elsewhere if upload is None else upload):
            absolute = os.path.abspath(os.path.expanduser(path))
            by_path = {"source": "path", "path": absolute, **given}
            try:
                return self._bring_in(by_path, idempotency_key)
            except SkiplineError as error:
                if upload is False or error.code != "path_not_allowed":
                    raise
        sent = self.upload(path, progress=progress)
        return self._bring_in({"source": "upload", "upload_id": sent.id, **given}, idempotency_key)

    def _bring_in(self, document: dict[str, Any], idempotency_key: str | None) -> Job:
        return self._new_job("datasets", idempotency_key, json=document)

    @property
    def _is_elsewhere(self) -> bool:
        """Whether the server is on another machine, as its address has it."""
        return self._http.base_url.host not in LOOPBACK

    def upload(
        self,
        path: str | os.PathLike[str],
        *,
        progress: Progress = lambda sent, total: None,
        memory: Memory | None = None,
    ) -> Upload:
        """Sends a file, or a folder as a tar archive, in parts. Where this was begun before and
        broken off, it goes on there, as long as the files are the same; it outlasts restarts of the
        server. `memory` keeps what is under way.

        Raises `OSError` for files that cannot be read, and `SourceChanged` for those that change
        meanwhile.
        """
        source = open_source(Path(path).expanduser())
        memory = memory or Memory()
        upload = self._begin_upload(source, memory)
        patience = Patience(self.patience)
        offset, size = upload.offset, part_bytes()
        progress(offset, source.num_bytes)
        while offset < source.num_bytes:
            data = source.read(offset, min(size, source.num_bytes - offset))
            try:
                offset = self._send_part(upload.id, data, offset)
            except (ServerUnreachable, SkiplineError) as error:
                if not _is_passing(error):
                    raise
                patience.pause(error)
                offset = self._offset(upload.id, patience)
            else:
                patience.reset()
            progress(offset, source.num_bytes)
        memory.note(self.url, source.fingerprint, None)
        return self._ask(Upload, "GET", f"uploads/{_segment(upload.id)}")

    def _begin_upload(self, source: Source, memory: Memory) -> Upload:
        """The upload that was begun of this source, or a new one."""
        known = memory.recall(self.url, source.fingerprint)
        if known is not None:
            try:
                upload = self._ask(Upload, "GET", f"uploads/{_segment(known)}")
            except SkiplineError as error:
                if error.status != 404:
                    raise
            else:
                if upload.num_bytes == source.num_bytes and upload.job_id is None:
                    return upload
        encoded = base64.b64encode(source.name.encode("utf-8", "replace")).decode()
        headers = {
            "Tus-Resumable": "1.0.0",
            "Upload-Length": str(source.num_bytes),
            "Upload-Metadata": f"filename {encoded}",
        }
        upload = self._ask(Upload, "POST", "uploads", headers=headers)
        memory.note(self.url, source.fingerprint, upload.id)
        return upload

    def _send_part(self, upload_id: str, data: bytes, offset: int) -> int:
        """Where the next part begins."""
        headers = {
            "Tus-Resumable": "1.0.0",
            "Content-Type": "application/offset+octet-stream",
            "Upload-Offset": str(offset),
        }
        path = f"uploads/{_segment(upload_id)}"
        answer = self._answer("PATCH", path, content=data, headers=headers, expected=(204,))
        return int(answer.headers["upload-offset"])

    def _offset(self, upload_id: str, patience: Patience) -> int:
        """How much the server has, once it answers again."""
        while True:
            try:
                return self._ask(Upload, "GET", f"uploads/{_segment(upload_id)}").offset
            except ServerUnreachable as error:
                patience.pause(error)

    def architectures(self) -> list[Architecture]:
        """The networks that can be asked for."""
        pages = self._pages(Page[Architecture], "architectures")
        return [architecture for page in pages for architecture in page.items]

    def recipes(self) -> list[Recipe]:
        """The trainings that can be asked for by name."""
        pages = self._pages(Page[Recipe], "recipes")
        return [recipe for page in pages for recipe in page.items]

    def predict(
        self,
        images: str | os.PathLike[str] | bytes | Sequence[str | os.PathLike[str] | bytes],
        *,
        model: str = PRODUCTION,
        top_k: int | None = None,
        explain: bool = False,
        features: bool = False,
    ) -> Predictions:
        """Classifies images, given as paths or as the bytes of image files.

        `model`: an alias, a checkpoint's id, or a job's for its best checkpoint. Raises `OSError`
        for a path that cannot be read. `explain` adds a picture of where each answer comes from,
        `features` the means of the network's last feature map.
        """
        if isinstance(images, (str, bytes, os.PathLike)):
            images = [images]
        files = [("image", _upload(image, place)) for place, image in enumerate(images)]
        form = {"model": model} | ({} if top_k is None else {"top_k": str(top_k)})
        form |= {"explain": "true"} if explain else {}
        form |= {"features": "true"} if features else {}
        return self._ask(Predictions, "POST", "predict", data=form, files=files)

    # Models under the names by which they are served.

    def models(self) -> list[Model]:
        """What each alias stands for."""
        return [model for page in self._pages(Page[Model], "models") for model in page.items]

    def model(self, alias: str) -> Model:
        """What the alias stands for."""
        return self._ask(Model, "GET", f"models/{_segment(alias)}")

    def promote(
        self,
        model: str | None,
        alias: str = PRODUCTION,
        *,
        notes: str | None = None,
        tags: Sequence[str] | None = None,
        require: str | None = None,
        against: str | None = None,
        dataset: str | None = None,
        split: str | None = None,
    ) -> Model:
        """Lets the alias stand for a model: a checkpoint's id, a job's for its best checkpoint, or
        another alias; without one only `notes` and `tags` are changed. What is None stays.

        With `require` (`top1>=0.93,min_class_accuracy>=0.8`) or `against`, another model that this
        one must not be worse than, only if its report on `dataset` and `split` allows it: otherwise
        a `SkiplineError` with the code `promotion_refused`, or `not_evaluated`."""
        change = {"checkpoint_id": model, "notes": notes, "tags": tags}
        given = {key: value for key, value in change.items() if value is not None}
        asked = {"require": require, "against": against, "dataset": dataset, "split": split}
        return self._ask(Model, "PUT", f"models/{_segment(alias)}", json=given, params=asked)

    def rollback(self, alias: str = PRODUCTION) -> Model:
        """Lets the alias stand for what it stood for before its last move."""
        return self._ask(Model, "POST", f"models/{_segment(alias)}/rollback")

    def compare(
        self, a: str, b: str, *, dataset: str | None = None, split: str | None = None
    ) -> Comparison:
        """Two models (aliases, or ids of jobs or checkpoints) on images that both were evaluated
        on; by default the split `test`, else `val`, of what `a` was trained on."""
        query = {"a": a, "b": b, "dataset": dataset, "split": split}
        return self._ask(Comparison, "GET", "compare", params=query)

    def model_card(self, alias: str = PRODUCTION) -> str:
        """What there is to know of a model before it is used, in Markdown."""
        return self._content("text/markdown", f"models/{_segment(alias)}/card").text

    def export_model(
        self,
        path: str | os.PathLike[str],
        model: str = PRODUCTION,
        *,
        format: ExportFormat | None = None,
    ) -> None:
        """Writes a model (an alias, or the id of a job or a checkpoint) to a file; `format` is by
        default what the file's suffix says. The file is complete or not there. Raises `OSError` if
        it cannot be written."""
        target = Path(path)
        formats = {suffix: name for name, suffix in EXPORT_SUFFIXES.items()}
        kind = format or formats.get(target.suffix.lower())
        if kind is None:
            raise ValueError(f"name the format, or end the file's name in {', '.join(formats)}")
        self._save(
            f"models/{_segment(model)}/export",
            target,
            "application/octet-stream",
            {"format": kind},
            timeout=EXPORT_SECONDS,
        )

    def import_model(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        progress: Progress = lambda sent, total: None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Sends a model that was exported as safetensors; once the job has succeeded, its id is
        the model's.

        Raises `OSError` for a file that cannot be read, and `SourceChanged` for one that changes
        meanwhile.
        """
        document = {"kind": "import", "upload_id": self.upload(path, progress=progress).id}
        if name is not None:
            document["name"] = name
        return self.submit(document, idempotency_key=idempotency_key)

    def model_history(self, alias: str = PRODUCTION) -> list[AliasMove]:
        """What the alias has stood for, the newest first."""
        pages = self._pages(Page[AliasMove], f"models/{_segment(alias)}/history")
        return [move for page in pages for move in page.items]

    def delete_alias(self, alias: str) -> None:
        """Takes the name away; the model stays."""
        self._answer("DELETE", f"models/{_segment(alias)}", expected=(204,))

    def workers(self) -> list[Worker]:
        """The workers that were seen within the last hour, and what each of them runs."""
        return [worker for page in self._pages(Page[Worker], "workers") for worker in page.items]

    def ready(self) -> Readiness:
        """Whether the server can work, and each thing that it needs."""
        return self._ask(Readiness, "GET", "readyz", expected=(200, 503))

    # The wire.

    def _act(self, job_id: str, action: str) -> Job:
        return self._ask(Job, "POST", f"jobs/{_segment(job_id)}/{action}")

    def _new_job(self, path: str, idempotency_key: str | None, **request: Any) -> Job:
        """Asks for a new job, again where the answer was lost. A server that could not be reached
        in the first place is told at once."""
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        patience = Patience(self.patience)
        is_sent = False
        while True:
            try:
                return self._ask(Job, "POST", path, headers=headers, **request)
            except ServerUnreachable as error:
                is_sent |= error.may_have_arrived
                if not is_sent:
                    raise
                patience.pause(error)

    def _stream(
        self, path: str, kinds: Mapping[str, type[DocumentT]], last_event_id: int | None
    ) -> Iterator[DocumentT]:
        """The events of a stream until its end, over as many connections as it takes."""
        patience = Patience(self.patience)
        while True:
            opened = time.monotonic()
            try:
                for number, event in self._connection(path, kinds, last_event_id):
                    patience.reset()
                    last_event_id = number
                    yield event
                    if isinstance(event, EndEvent):
                        return
                reason = "the stream ended early"
            except httpx2.TransportError as error:
                reason = _reason(error)
            except ServerUnreachable as error:
                reason = error.reason
            if time.monotonic() - opened > LONGEST_PAUSE_SECONDS:
                patience.reset()  # It was up and silent; this is no row of failures.
            patience.pause(ServerUnreachable(self.url, reason))

    def _connection(
        self, path: str, kinds: Mapping[str, type[DocumentT]], last_event_id: int | None
    ) -> Iterator[tuple[int | None, DocumentT]]:
        """The events of one connection, each with the number after which to go on. Raises httpx2's
        `TransportError` when it breaks."""
        with self._http.sse(
            path,
            headers={} if last_event_id is None else {"Last-Event-ID": str(last_event_id)},
            timeout=httpx2.Timeout(self._timeout, read=STREAM_SILENCE_SECONDS),
        ) as source:
            if not source.response.is_success:
                source.response.read()
                raise self._refusal(source.response)
            try:
                for event in source:
                    if kind := kinds.get(event.event):
                        number = int(event.id) if event.id else last_event_id
                        yield number, kind.model_validate({**_object(event), "id": number})
            except (httpx2.SSEError, ValueError):
                raise self._stranger(source.response) from None

    def _pages(
        self,
        kind: type[PageT],
        path: str,
        query: Mapping[str, Any] | None = None,
        limit: int | None = None,
    ) -> Iterator[PageT]:
        size = PAGE_SIZE if limit is None else min(limit, PAGE_SIZE)
        after: str | None = None
        while True:
            part = {**(query or {}), "limit": size, "after": after}
            page = self._ask(kind, "GET", path, params=part)
            yield page
            after = page.next
            if after is None:
                return

    def _ask(self, kind: type[DocumentT], method: str, path: str, **request: Any) -> DocumentT:
        response = self._answer(method, path, **request)
        try:
            return kind.model_validate_json(response.content)
        except ValidationError:
            raise self._stranger(response) from None

    def _content(
        self, media_type: str, path: str, query: Mapping[str, Any] | None = None
    ) -> httpx2.Response:
        """An answer that is no JSON."""
        response = self._answer("GET", path, params=query)
        if response.headers.get("content-type", "").partition(";")[0] != media_type:
            raise self._stranger(response)
        return response

    def _save(
        self,
        path: str,
        target: Path,
        media_type: str,
        params: Mapping[str, Any],
        timeout: float | None = None,
    ) -> None:
        """Writes an answer of any length to a file, which is complete or not there. `timeout`:
        seconds until it may begin, if others than usual."""
        part = target.with_name(f"{target.name}.part")
        try:
            with (
                self._http.stream(
                    "GET", path, params=params, timeout=timeout or self._timeout
                ) as response,
                part.open("wb") as file,
            ):
                if response.status_code != 200:
                    response.read()
                    raise self._refusal(response)
                if response.headers.get("content-type", "").partition(";")[0] != media_type:
                    raise self._stranger(response)
                for data in response.iter_bytes():
                    file.write(data)
            os.replace(part, target)
        except httpx2.TransportError as error:
            raise ServerUnreachable(self.url, _reason(error)) from error
        finally:
            part.unlink(missing_ok=True)

    def _answer(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        expected: Sequence[int] = (200, 201, 202),
        **request: Any,
    ) -> httpx2.Response:
        query = {key: value for key, value in (params or {}).items() if value is not None}
        try:
            response = self._http.request(method, path, params=query, **request)
        except httpx2.TransportError as error:
            never_left = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
            raise ServerUnreachable(
                self.url, _reason(error), may_have_arrived=not never_left
            ) from error
        if response.status_code not in expected:
            raise self._refusal(response)
        return response

    def _refusal(self, response: httpx2.Response) -> SkiplineError:
        """The error that an answer other than 2xx stands for."""
        try:
            problem = ProblemDocument.model_validate_json(response.content)
        except ValidationError:
            return self._stranger(response)
        return SkiplineError(
            problem.detail, code=problem.code, status=response.status_code, errors=problem.errors
        )

    def _stranger(self, response: httpx2.Response) -> SkiplineError:
        """The error for an answer that no Skipline server gives."""
        if response.status_code in (502, 503, 504):
            return ServerUnreachable(self.url, f"a gateway says {response.status_code}")
        request = response.request
        return SkiplineError(
            f"{request.method} {request.url} answered {response.status_code} with something that "
            "is not Skipline's. Does SKIPLINE_API_URL name a Skipline server of this version?",
            code="unexpected_answer",
            status=response.status_code,
        )


def _is_passing(error: SkiplineError) -> bool:
    """Whether the same part may be sent again in a while: nobody answered, somebody else writes, or
    more has come than was told."""
    return isinstance(error, ServerUnreachable) or error.status in (409, 423, 503)


def _reason(error: httpx2.TransportError) -> str:
    """In words; an error's number says nothing that its text does not."""
    text = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
    return text[:1].lower() + text[1:]


def _segment(value: str) -> str:
    return quote(value, safe="")


def _training(
    spec: TrainSpec | Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    given = _as_written(spec) if isinstance(spec, TrainSpec) else dict(spec or {})
    return {"kind": "train", **given, **settings}


def _as_written(spec: RequestSpec) -> dict[str, Any]:
    """The keys that were given; the server fills in its own defaults, and may do so by dataset."""
    document = spec.model_dump(mode="json", exclude_unset=True)
    document["kind"] = spec.kind
    for part in ("optimizer", "scheduler"):
        if part in document:  # The name chooses the variant, also where it was left to its class.
            document[part]["name"] = getattr(spec, part).name
    return document


def _upload(image: str | os.PathLike[str] | bytes, place: int) -> tuple[str, bytes]:
    if isinstance(image, bytes):
        return str(place), image
    path = Path(image)
    return path.name, path.read_bytes()


def _object(event: httpx2.ServerSentEvent) -> dict[str, Any]:
    data = event.json()
    return data if isinstance(data, dict) else {}
