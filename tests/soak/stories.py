"""What clients of a soak ask for: short jobs of every kind, and what must come of each.

A story is one client that posts a job or a few, asks things of them, and notes what has to come of
it. It knows only HTTP, and tries again whatever got no answer.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

NUM_DATASETS = 3
LABELS = ("across", "down")
NUM_IMAGES = {"train": 24, "test": 8}
"""Of each class."""
STEPS_PER_EPOCH = 6
LOG_EVERY_STEPS = 2
LONG = 5000
"""Epochs of a training that does not come to its end by itself."""
TERMINAL = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Promise:
    """How a job has to end. `num_epochs`: a training's curve is whole, to this epoch; 0 for one
    that was stopped somewhere, None for what has no curve."""

    job_id: str
    story: str
    status: str
    num_epochs: int | None = None
    stop_reason: str | None = None
    error_code: str | None = None


@dataclass
class Ledger:
    """What was promised, by all stories; and what went wrong in their eyes."""

    promises: dict[str, Promise] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    wrongs: list[str] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)


class OutOfTime(Exception):
    """A story did not come to its end."""


@dataclass
class Deadline:
    """Until when stories may go on, by `time.monotonic()`."""

    at: float

    @property
    def has_passed(self) -> bool:
        return time.monotonic() > self.at


class Client:
    """Calls that are tried again until they are answered. Raises `OutOfTime` after `deadline`."""

    def __init__(self, url: str, deadline: Deadline, ledger: Ledger) -> None:
        self._http = httpx2.Client(base_url=url, timeout=20, trust_env=False)
        self._deadline = deadline
        self.ledger = ledger

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> httpx2.Response:
        """The first answer that is one. 503 is none: the database may be away."""
        while not self._deadline.has_passed:
            try:
                answer = self._http.request(method, path, json=body, headers=headers)
            except httpx2.TransportError:
                time.sleep(0.3)
                continue
            if answer.status_code == 500:
                self.ledger.wrongs.append(f"{method} {path} answered 500: {answer.text[:300]}")
            if answer.status_code < 500:
                return answer
            time.sleep(0.3)
        raise OutOfTime(f"{method} {path}")

    def post(self, body: dict[str, Any], path: str = "/jobs") -> str:
        """The id of the new job: one, however often it was asked for."""
        answer = self.ask("POST", path, body, {"Idempotency-Key": uuid.uuid4().hex})
        if answer.status_code != 202:
            raise AssertionError(f"POST {path}: {answer.status_code} {answer.text[:300]}")
        job_id: str = answer.json()["id"]
        return job_id

    def job(self, job_id: str) -> dict[str, Any]:
        answer = self.ask("GET", f"/jobs/{job_id}")
        if answer.status_code != 200:
            raise AssertionError(f"GET /jobs/{job_id}: {answer.status_code} {answer.text[:300]}")
        document: dict[str, Any] = answer.json()
        return document

    def wait(self, job_id: str, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The job as soon as it fulfils `condition`, or is over."""
        while not self._deadline.has_passed:
            job = self.job(job_id)
            if job["status"] in TERMINAL or condition(job):
                return job
            time.sleep(0.7)
        raise OutOfTime(f"job {job_id}: {self.job(job_id)['status']}")

    def end(self, job_id: str) -> str:
        status: str = self.wait(job_id, lambda job: False)["status"]
        return status

    def request(self, job_id: str, action: str, condition: Callable[[dict[str, Any]], Any]) -> bool:
        """Asks for the action once the job fulfils `condition`, until it is granted; False when the
        job was over before."""
        while True:
            job = self.wait(job_id, condition)
            if job["status"] in TERMINAL:
                return False
            answer = self.ask("POST", f"/jobs/{job_id}/{action}")
            if answer.status_code == 200:
                self.ledger.asked[action] += 1
                return True
            if answer.json()["code"] != "illegal_transition":
                raise AssertionError(f"{action}: {answer.status_code} {answer.text[:300]}")
            time.sleep(0.2)  # Its worker was lost in between, say.

    def close(self) -> None:
        self._http.close()


@dataclass
class Teller:
    """Tells stories for one client."""

    client: Client
    rng: random.Random
    images: Path

    def promise(self, job_id: str, status: str, **more: Any) -> None:
        story = more.pop("story")
        self.client.ledger.promises[job_id] = Promise(job_id, story, status, **more)

    def training(self, epochs: int, **keys: Any) -> dict[str, Any]:
        """ResNet-18 on 8x8 pixels, six steps an epoch."""
        return {
            "kind": "train",
            "dataset": f"stripes{self.rng.randrange(NUM_DATASETS)}",
            "image_size": 8,
            "augment": ["random_crop"],
            "epochs": epochs,
            "batch_size": 8,
            "optimizer": {"lr": 0.05, "momentum": 0, "nesterov": False},
            "log_every_steps": LOG_EVERY_STEPS,
            "precision": "fp32",
            "priority": self.rng.randint(-10, 10),
            "seed": self.rng.randrange(2**31),
        } | keys

    def train(self) -> None:
        """A training; half of them are deleted afterwards."""
        job_id = self.client.post(self.training(2))
        self.promise(job_id, "succeeded", story="train", num_epochs=2)
        if self.client.end(job_id) == "succeeded" and self.rng.random() < 0.5:
            self.delete(job_id)

    def delete(self, job_id: str) -> None:
        answer = self.client.ask("DELETE", f"/jobs/{job_id}")
        # 404 where the first answer was lost.
        if answer.status_code not in (204, 404):
            raise AssertionError(f"DELETE: {answer.status_code} {answer.text[:300]}")
        self.client.ledger.deleted.add(job_id)
        self.client.ledger.asked["delete"] += 1

    def train_and_evaluate(self) -> None:
        """An evaluation that waits for the training whose model it measures."""
        spec = self.training(1)
        training = self.client.post(spec)
        self.promise(training, "succeeded", story="evaluate after a training", num_epochs=1)
        evaluation = self.client.post(
            {"kind": "evaluate", "model": training, "dataset": spec["dataset"], "after": training}
        )
        self.promise(evaluation, "succeeded", story="evaluate after a training")
        self.client.end(evaluation)

    def train_and_predict(self) -> None:
        """A batch prediction that waits for its model, and then has an answer for each image."""
        story = "batch prediction after a training"
        spec = self.training(1)
        training = self.client.post(spec)
        self.promise(training, "succeeded", story=story, num_epochs=1)
        job_id = self.client.post(
            {"kind": "predict", "model": training, "dataset": spec["dataset"], "after": training}
        )
        self.promise(job_id, "succeeded", story=story)
        if self.client.end(job_id) == "succeeded":
            answer = self.client.ask("GET", f"/jobs/{job_id}/predictions")
            assert answer.status_code == 200, answer.text[:300]
            found = Counter(
                (image["split"], image["label"])
                for image in answer.json()["predictions"]
                if len(image["top"]) == len(LABELS)
            )
            wanted = {
                (split, label): count for split, count in NUM_IMAGES.items() for label in LABELS
            }
            assert found == wanted, found

    def fine_tune(self) -> None:
        """A training that begins with the weights of the one it waits for."""
        spec = self.training(1)
        first = self.client.post(spec)
        self.promise(first, "succeeded", story="train after a training", num_epochs=1)
        model = {"arch": "resnet18", "init_from": first}
        second = self.client.post(spec | {"model": model, "after": first})
        self.promise(second, "succeeded", story="train after a training", num_epochs=1)
        self.client.end(second)

    def fail(self) -> None:
        """A training that diverges, and two that wait for it, one through the other."""
        story = "a chain whose first fails"
        bad = self.training(3, optimizer={"lr": 1000, "momentum": 0.99}, priority=10)
        first = self.client.post(bad)
        self.promise(first, "failed", story=story, error_code="nan_loss")
        before = first
        for _ in range(2):
            before = self.post_after(before, first, story)
        self.client.end(before)

    def post_after(self, before: str, root: str, story: str) -> str:
        """A job that fails with `before`; one that is over by now is refused as a predecessor."""
        answer = self.client.ask(
            "POST",
            "/jobs",
            self.training(1, after=before),
            {"Idempotency-Key": uuid.uuid4().hex},
        )
        if answer.status_code == 422 and self.client.end(root) == "failed":
            return before
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        self.promise(job_id, "failed", story=story, error_code="predecessor_failed")
        return job_id

    def cancel_at_once(self) -> None:
        job_id = self.client.post(self.training(LONG, priority=-10))
        self.promise(job_id, "cancelled", story="cancelled at once")
        self.client.request(job_id, "cancel", lambda job: True)
        self.client.end(job_id)

    def cancel(self) -> None:
        job_id = self.client.post(self.training(LONG))
        self.promise(job_id, "cancelled", story="cancelled while it ran")
        self.client.request(job_id, "cancel", lambda job: job["status"] == "running")
        self.client.end(job_id)

    def pause(self) -> None:
        """Paused as soon as it gets on, then resumed."""
        job_id = self.client.post(self.training(3))
        self.promise(job_id, "succeeded", story="paused and resumed", num_epochs=3)
        if self.client.request(job_id, "pause", _gets_on):
            paused = self.client.wait(job_id, lambda job: job["status"] == "paused")
            if paused["status"] == "paused":
                time.sleep(self.rng.uniform(0, 2))
                self.client.request(job_id, "resume", lambda job: job["status"] != "pausing")
        self.client.end(job_id)

    def stop(self) -> None:
        job_id = self.client.post(self.training(LONG))
        self.promise(job_id, "succeeded", story="stopped", num_epochs=0, stop_reason="user")
        self.client.request(job_id, "stop", _gets_on)
        self.client.end(job_id)

    def retry(self) -> None:
        """Cancelled after its first checkpoint, then retried."""
        job_id = self.client.post(self.training(3))
        self.promise(job_id, "cancelled", story="retried")
        self.client.request(job_id, "cancel", _has_an_epoch)
        if self.client.end(job_id) == "succeeded":  # It was over just before, or as it was asked.
            self.promise(job_id, "succeeded", story="retried", num_epochs=3)
            return
        again = self.client.post({}, f"/jobs/{job_id}/retry")
        self.client.ledger.asked["retry"] += 1
        self.promise(again, "succeeded", story="retried", num_epochs=3)
        self.client.end(again)

    def dry_run(self) -> None:
        job_id = self.client.post(self.training(2), "/jobs?dry_run=true")
        self.promise(job_id, "succeeded", story="dry run")
        self.client.end(job_id)

    def ingest(self) -> None:
        """Images that are there already: the same dataset, by its hash."""
        number = self.rng.randrange(NUM_DATASETS)
        job_id = self.client.post(ingest_request(self.images, number), "/datasets")
        self.promise(job_id, "succeeded", story="ingest")
        self.client.end(job_id)


def _gets_on(job: dict[str, Any]) -> bool:
    return job["status"] == "running" and job["progress"] is not None


def _has_an_epoch(job: dict[str, Any]) -> bool:
    return _gets_on(job) and job["progress"]["epoch"] >= 1


Story = Callable[[Teller], None]
STORIES: tuple[tuple[Story, int, int], ...] = (
    # The story, the jobs that it posts, and how often it is told, of all.
    (Teller.train, 1, 5),
    (Teller.train_and_evaluate, 2, 3),
    (Teller.train_and_predict, 2, 2),
    (Teller.fine_tune, 2, 2),
    (Teller.fail, 3, 3),
    (Teller.cancel_at_once, 1, 6),
    (Teller.cancel, 1, 3),
    (Teller.pause, 1, 4),
    (Teller.stop, 1, 4),
    (Teller.retry, 2, 3),
    (Teller.dry_run, 1, 2),
    (Teller.ingest, 1, 2),
)


def draw(rng: random.Random, num_jobs: int) -> Iterator[Story]:
    """Stories that post about so many jobs, in a random order: first each once, as far as that
    goes, then by weight."""
    once = list(STORIES)
    rng.shuffle(once)
    weights = [weight for _, _, weight in STORIES]
    left = num_jobs
    while left > 0:
        story, num, _ = once.pop() if once else rng.choices(STORIES, weights)[0]
        yield story
        left -= num


def make_images(folder: Path) -> None:
    """`NUM_DATASETS` folders of PNG files of 8x8 pixels: class `across` has horizontal stripes,
    `down` vertical ones, with noise."""
    rows = np.arange(8)
    for number in range(NUM_DATASETS):
        rng = np.random.default_rng(number)
        for split, count in NUM_IMAGES.items():
            for turns, label in enumerate(LABELS):
                place = folder / f"stripes{number}" / split / label
                place.mkdir(parents=True)
                for index in range(count):
                    wave = 128 + 100 * np.sin(rows * 1.6 + rng.uniform(0, 6))
                    grid = np.rot90(np.tile(wave[:, None], (1, 8)), turns)
                    noisy = np.clip(grid + rng.normal(0, 10, (8, 8)), 0, 255).astype(np.uint8)
                    Image.fromarray(noisy).convert("RGB").save(place / f"{index:03}.png")


def ingest_request(images: Path, number: int) -> dict[str, Any]:
    name = f"stripes{number}"
    return {"source": "path", "path": str(images / name), "name": name}


def tell(story: Story, teller: Teller, lock: threading.Lock) -> None:
    """Tells it to its end, and notes what went wrong."""
    try:
        story(teller)
    except Exception as error:
        with lock:
            what = f"{story.__name__}: {type(error).__name__}: {error}"
            teller.client.ledger.wrongs.append(what)
    finally:
        teller.client.close()
