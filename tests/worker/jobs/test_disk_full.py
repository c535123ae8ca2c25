"""A disk that fills up while checkpoints or answers are written: the job fails, and what was stored
before is as good as ever."""

from __future__ import annotations

import io
import resource
import zipfile
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest

from shared.tables import Job
from shared.vision import bundle
from skipline.schemas import JobStatus
from tests.worker.jobs.conftest import (
    LOOKS_PER_EPOCH,
    STEPS_PER_EPOCH,
    Shop,
    Supervised,
    small_network,
)
from worker.datasets import disk
from worker.engine import trainer
from worker.jobs import training

MIB = 2**20


def assert_disk_full(shop: Shop, job: Job, last_step: int) -> None:
    """It has failed, left nothing behind, and its last checkpoint is whole."""
    assert job.status == JobStatus.failed
    assert job.error is not None
    assert job.error["code"] == "disk_full"
    assert "a checkpoint" in job.error["message"]
    assert "deleting jobs" in job.error["hint"]
    assert str(shop.settings.home_path) not in str(job.error)
    assert list((shop.storage.root / "staging").iterdir()) == []
    rows = shop.checkpoints(job.id)
    assert [row.step for row in rows if row.kind == "last"] == ([last_step] if last_step else [])
    assert set(shop.storage.keys(f"jobs/{job.id}" if rows else "jobs")) == {r.key for r in rows}
    for row in rows:
        shop.storage.verify(row.key)


def test_a_checkpoint_that_would_not_fit_is_not_begun(shop: Shop) -> None:
    shop.settings = shop.settings.model_copy(update={"reserved_disk_bytes": 2**60})
    job = shop.attempt(shop.train())
    assert_disk_full(shop, job, last_step=0)
    assert job.error is not None
    # Parameters: 108 of the convolution, 8 of the norm, 2,056 and 18 of the layers. Each has its
    # momentum. The norm has 8 statistics and a counter of 8 bytes; the log's window has two sums.
    num_parameters = 108 + 8 + 2056 + 18
    needed = 2**60 + 2 * 4 * num_parameters + 4 * 8 + 8 + 4 * 2
    assert f"{needed} bytes are needed" in job.error["message"]


def test_after_disk_was_freed_a_retry_goes_on_from_the_last_checkpoint(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = pytest.MonkeyPatch()

    def before(look: int) -> None:
        if look == LOOKS_PER_EPOCH + 2:
            usage = SimpleNamespace(free=shop.settings.reserved_disk_bytes + 1000)
            full.setattr(disk.shutil, "disk_usage", lambda folder: usage)

    with full.context():
        try:
            job = shop.attempt(shop.train(), Supervised(before=before))
        finally:
            full.undo()
    assert_disk_full(shop, job, last_step=STEPS_PER_EPOCH)
    again = shop.attempt(shop.retry(job.id))
    assert again.status == JobStatus.succeeded
    twin = shop.attempt(shop.train())
    assert shop.last_weights(again.id) == shop.last_weights(twin.id)


@pytest.fixture
def file_limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("file_limit")
@pytest.mark.parametrize("limit_bytes", [6 * MIB, 12 * MIB], ids=["weights", "resume state"])
def test_a_last_checkpoint_that_cannot_be_written_fails_the_job(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, limit_bytes: int
) -> None:
    # 8 MiB of weights; with the average beside them and momentum, 16 MiB to resume from.
    large = partial(small_network, num_hidden=8192)
    for module in (bundle, trainer, training):
        monkeypatch.setattr(module, "build_model", large)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def before(look: int) -> None:
        if look == 2 * LOOKS_PER_EPOCH:  # the last batch of the last validation
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))

    job = shop.attempt(shop.train(epochs=2, ema_decay=0.9), Supervised(before=before))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert_disk_full(shop, job, last_step=STEPS_PER_EPOCH)
    evaluation = shop.attempt(shop.evaluate(job.id))
    assert evaluation.status == JobStatus.succeeded, evaluation.error


@pytest.mark.usefixtures("file_limit")
def test_answers_that_cannot_be_written_fail_the_job_and_leave_the_upload(shop: Shop) -> None:
    model = shop.train(epochs=1)
    assert shop.attempt(model).status == JobStatus.succeeded
    packed, num_files = io.BytesIO(), 20_000
    with zipfile.ZipFile(packed, "w") as archive:
        for number in range(num_files):  # each a line of more than 200 bytes
            archive.writestr(f"{'folder' * 30}/{number}.txt", b"")
    upload_id = shop.upload("images.zip", packed.getvalue())
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    first = shop.predict(model, upload_id=upload_id)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, hard))
    job = shop.attempt(first)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert job.status == JobStatus.failed
    assert job.error is not None
    assert job.error["code"] == "disk_full"
    assert "the predictions" in job.error["message"]
    assert list((shop.storage.root / "staging").iterdir()) == []
    assert shop.storage.keys(f"jobs/{model}") == sorted({r.key for r in shop.checkpoints(model)})
    again = shop.attempt(shop.predict(model, upload_id=upload_id))
    assert again.status == JobStatus.succeeded, again.error
    assert again.result is not None
    assert again.result["num_images"] == num_files
