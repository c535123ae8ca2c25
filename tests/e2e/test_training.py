"""What training promises, through the service: killed as often as one likes it ends with the bits
of a run that was not; several processes learn as one; wrong specs are refused where they are wrong.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from skipline import Skipline
from skipline.client import SkiplineError
from skipline.schemas import Job, JobKind, JobStatus
from tests.e2e.conftest import Service, bring_in, final_weights, on_sqlite, tiny_spec, wait_for

STEPS_PER_EPOCH = 6
NUM_KILLS = 10


@pytest.fixture
def stack() -> dict[str, str]:
    """SQLite and files, on the CPU: what is tested here does not depend on them."""
    return {"SKIPLINE_MAX_CRASHES": "100", "SKIPLINE_DEVICE": "cpu"}


def last_step(client: Skipline, job: Job) -> int:
    """Of the newest checkpoint; 0 without one."""
    return max((checkpoint.step for checkpoint in client.checkpoints(job.id)), default=0)


def curve(client: Skipline, job: Job, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.metrics(job.id).series[name]]


def finished(client: Skipline, job: Job) -> Job:
    ended = client.wait(job.id)
    assert ended.status is JobStatus.succeeded, ended.error
    return ended


@pytest.mark.timeout(600)
def test_a_training_killed_ten_times_ends_with_the_bits_of_one_that_was_not(
    service: Service, stripes: Path
) -> None:
    epochs = 5
    num_steps = STEPS_PER_EPOCH * epochs
    spec = tiny_spec(
        epochs=epochs,
        model={"arch": "resnet18", "dropout": 0.2},
        augment=["random_crop", "mixup"],
        ema_decay=0.9,
        precision="fp32",
    )
    with service.client() as client:
        bring_in(client, stripes)
        # A checkpoint at nearly every step, most of them within an epoch.
        job = client.submit({**spec, "checkpoint": {"every_minutes": 0.002}})
        for step in sorted(random.Random(0).sample(range(2, num_steps - 2), NUM_KILLS)):
            wait_for(lambda step=step: last_step(client, job) >= step, f"checkpoint at {step}")
            [trainer] = wait_for(lambda: service.trainers(job), "trainer")
            os.kill(trainer, signal.SIGKILL)
            wait_for(lambda gone=trainer: gone not in service.trainers(job), "end of the trainer")
        assert finished(client, job).attempt == 1 + NUM_KILLS
        resumed = [e.data["step"] for e in client.events(job.id) if e.type == "resumed"]
        assert sum(step % STEPS_PER_EPOCH > 0 for step in resumed) >= 3  # within an epoch
        twin = client.submit(spec)
        assert finished(client, twin).attempt == 1
        for name in ("train_loss", "train_top1", "val_loss", "lr"):
            assert curve(client, job, name) == curve(client, twin, name)
        assert final_weights(service, client, job) == final_weights(service, client, twin)


@pytest.mark.timeout(600)
def test_two_processes_learn_as_one_and_die_together(service: Service, stripes: Path) -> None:
    # Batch norm would blow up the order in which floats are added: at 8 px, with so few images,
    # a change of the weights by a millionth changes the loss by a hundredth within ten steps.
    spec = tiny_spec(
        epochs=4,
        model={"arch": "vgg11"},
        image_size=32,
        optimizer={"lr": 0.01, "momentum": 0, "nesterov": False},
        scheduler={"name": "constant"},
        precision="fp32",
    )

    def ranks() -> list[int]:
        return service.processes("multiprocessing.spawn")

    with service.client() as client:
        bring_in(client, stripes)
        job = client.submit({**spec, "resources": {"device": "cpu", "num_processes": 2}})
        wait_for(lambda: last_step(client, job) >= STEPS_PER_EPOCH, "first checkpoint")
        assert len(ranks()) == 2
        attempt = ranks()
        os.kill(attempt[1], signal.SIGKILL)  # One of them: the other one leaves too.
        wait_for(lambda: not set(attempt) & set(ranks()), "end of both ranks")
        wait_for(lambda: client.job(job.id).attempt == 2 and len(ranks()) == 2, "second attempt")
        attempt = ranks()
        [trainer] = service.trainers(job)
        os.kill(trainer, signal.SIGKILL)  # Their parent, of whose group they are not.
        wait_for(lambda: not set(attempt) & set(ranks()), "end of both ranks")
        assert finished(client, job).attempt == 3
        wait_for(lambda: not ranks(), "end of all ranks")

        twin = client.submit(spec)
        finished(client, twin)
        for name in ("train_loss", "val_loss"):
            ours, theirs = curve(client, job, name), curve(client, twin, name)
            assert [step for step, _ in ours] == [step for step, _ in theirs]
            assert [value for _, value in ours] == pytest.approx(
                [value for _, value in theirs], rel=1e-3
            )


@on_sqlite
def test_a_dry_run_says_what_a_training_would_take(shared_service: Service) -> None:
    with shared_service.client() as client:
        dry = finished(client, client.dry_run(tiny_spec()))
        assert dry.kind is JobKind.dry_run
        assert dry.result is not None
        # ResNet-18 has 11,689,512 parameters; its stem of 3x3 has 7,680 less than that of 7x7, and
        # a head for two classes 511,974 less than one for a thousand.
        assert dry.result["num_parameters"] == 11_169_858
        assert dry.result["seconds_per_epoch"] > 0
        assert dry.result["peak_memory_bytes"] > 100 * 2**20
        assert dry.result["multiply_adds"] > 30e6
        assert client.checkpoints(dry.id) == []
        assert client.metrics(dry.id).series == {}

        job = finished(client, client.submit(tiny_spec(epochs=1)))
        summary = client.summary(job.id)
        assert summary.num_parameters == dry.result["num_parameters"]
        assert summary.multiply_adds == dry.result["multiply_adds"]
        assert sum(layer.num_parameters for layer in summary.layers) == summary.num_parameters
        assert summary == client.summary(dry.id)
        [checkpoint] = {c.step: c for c in client.checkpoints(job.id)}.values()
        assert checkpoint.num_bytes == pytest.approx(dry.result["checkpoint_bytes"], rel=0.05)


@on_sqlite
def test_a_spec_that_cannot_work_is_refused_at_its_key(shared_service: Service) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("image_size", {"model": {"arch": "resnet18", "stem": "imagenet"}, "image_size": 8}),
        ("image_size", {"model": {"arch": "vgg16"}, "image_size": 16}),
        ("model.stem", {"model": {"arch": "vgg16", "stem": "small"}, "image_size": 32}),
        ("recipe", {"recipe": "tinyimagenet_vgg"}),
        ("precision", {"precision": "fp16", "resources": {"device": "cpu"}}),
        ("resources.num_processes", {"resources": {"device": "cuda", "num_processes": 2}}),
        ("resources.num_processes", {"batch_size": 9, "resources": {"num_processes": 2}}),
        ("accumulate_steps", {"batch_size": 9, "accumulate_steps": 2}),
        ("optimizer.lr", {"optimizer": {"lr": -1}}),
        ("augment.0.padding", {"augment": [{"name": "random_crop", "padding": 64}]}),
        ("epoch", {"epoch": 3}),
    ]
    with shared_service.client() as client:
        before = list(client.jobs())
        refused = []
        for _, keys in cases:
            with pytest.raises(SkiplineError) as caught:
                client.submit({"kind": "train", "dataset": "stripes", **keys})
            assert caught.value.status == 422
            refused.append([item.loc for item in caught.value.errors])
        assert refused == [[key] for key, _ in cases]
        assert list(client.jobs()) == before
