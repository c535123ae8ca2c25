"""Datasets that are brought in over real processes: broken off, killed, cancelled, deleted."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from skipline import Skipline
from skipline.client import SkiplineError
from skipline.schemas import Job, JobStatus
from tests.e2e.conftest import (
    Service,
    bring_in,
    draw_stripes,
    on_sqlite,
    tiny_spec,
    wait_for,
)

NUM_IMAGES = 16_000
"""Some seconds' worth of bringing in."""


def archive_of_noise(path: Path, num_images: int = NUM_IMAGES) -> Path:
    """A tar of different images of 24x24 pixels in four classes."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for number in range(num_images):
            pixels = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "BMP")
            info = tarfile.TarInfo(f"class{number % 4}/{number}.bmp")
            info.size = file.tell()
            file.seek(0)
            archive.addfile(info, file)
    return path


def stored_files(service: Service) -> list[str]:
    """What there is of datasets and uploads, finished or not."""
    root = service.home / "artifacts"
    folders = ("datasets", "uploads", "staging")
    trees = [tree for name in folders for tree in os.walk(root / name)]
    return sorted(
        str((Path(at) / name).relative_to(root)) for at, _, names in trees for name in names
    )


def begun(client: Skipline, archive: Path, name: str) -> Job:
    """An ingest in its midst."""
    job = client.add_dataset(archive, name=name, upload=True)

    def is_at_work() -> bool:
        progress = client.job(job.id).progress
        return progress is not None and 0 < progress.step < NUM_IMAGES

    wait_for(is_at_work, "images that were looked at")
    return job


@pytest.mark.timeout(240)
def test_an_ingest_whose_worker_is_killed_ends_as_one_that_was_not(
    service: Service, tmp_path: Path
) -> None:
    archive = archive_of_noise(tmp_path / "noise.tar")
    with service.client() as client:
        job = begun(client, archive, "noise")
        [worker] = service.processes("skipline worker")
        os.kill(worker, signal.SIGKILL)
        assert client.datasets().items == []
        ended = client.wait(job.id)
        assert (ended.status, ended.attempt) == (JobStatus.succeeded, 2), ended.error
        assert ended.result is not None
        twin = client.wait(client.add_dataset(archive, name="twin", upload=True).id)
        assert twin.result is not None
        assert twin.result["dataset_id"] == ended.result["dataset_id"]
        [dataset] = client.datasets().items
        assert sorted(dataset.labels) == ["noise:1", "twin:1"]
        assert dataset.splits["train"].per_class == [NUM_IMAGES // 4] * 4
        # Nothing is left of the two uploads, nor of the attempt that was killed.
        wait_for(lambda: len(stored_files(service)) == 5, "no more files than the dataset's")
        assert {name.split("/")[0] for name in stored_files(service)} == {"datasets"}

        cancelled = begun(client, archive, "again")
        client.cancel(cancelled.id)
        assert client.wait(cancelled.id).status is JobStatus.cancelled
        upload = f"uploads/{cancelled.spec['upload_id']}/data"
        wait_for(lambda: len(stored_files(service)) == 6, "no more files than the upload's")
        assert upload in stored_files(service)
        retried = client.wait(client.retry(cancelled.id).id)
        assert retried.status is JobStatus.succeeded, retried.error
        wait_for(lambda: upload not in stored_files(service), "end of the upload")


@on_sqlite
def test_what_was_sent_by_a_killed_command_is_gone_on_with_and_trained_on(
    shared_service: Service, tmp_path: Path
) -> None:
    folder = draw_stripes(tmp_path, seed=5)
    environment = shared_service.environment | {
        "SKIPLINE_API_URL": shared_service.url,
        "SKIPLINE_UPLOAD_PART_BYTES": "512",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "skipline", "datasets", "add", str(folder), "--upload"]
    command += ["--name", "sent"]
    first = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL)
    with shared_service.client() as client:

        def offset() -> int:
            uploads = client._answer("GET", "uploads").json()["items"]
            return max((upload["offset"] for upload in uploads), default=0)

        wait_for(lambda: offset() > 4096, "first parts")
        first.kill()
        first.wait()
        assert offset() < 64 * 1024
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        told = [line for line in done.stderr.splitlines() if line.startswith("sent ")]
        assert told[-1].startswith("sent 100%")
        dataset = client.dataset("sent")
        assert {split: info.num_images for split, info in dataset.splits.items()} == {
            "train": 48,
            "test": 16,
        }
        job = client.wait(client.submit(tiny_spec(dataset="sent", epochs=1)).id)
        assert (job.status, job.dataset_id) == (JobStatus.succeeded, dataset.id)
        assert client._answer("GET", "uploads").json()["items"] == []


def test_a_dataset_deleted_while_a_job_waits_for_it_is_a_typed_failure(
    shared_service: Service,
) -> None:
    with shared_service.client() as client:
        folder = draw_stripes(shared_service.home.parent / "doomed", seed=1)
        dataset_id = bring_in(client, folder, "doomed")
        blocker = client.submit(tiny_spec(epochs=10_000))
        wait_for(lambda: client.job(blocker.id).status is JobStatus.running, "running job")
        job = client.submit(tiny_spec(dataset="doomed", epochs=1))
        with pytest.raises(SkiplineError) as refused:
            client.delete_dataset("doomed")
        assert [item.loc for item in refused.value.errors] == [f"jobs/{job.id}"]
        client.delete_dataset("doomed", force=True)
        client.cancel(blocker.id)
        ended = client.wait(job.id)
        assert ended.error is not None
        assert (ended.status, ended.attempt) == (JobStatus.failed, 1)
        assert ended.error.code == "dataset_gone"
        with pytest.raises(SkiplineError) as refused:
            client.retry(job.id)
        assert (refused.value.status, refused.value.code) == (409, "dataset_gone")
        # The same images are the same dataset, and the job can be retried.
        assert bring_in(client, folder, "doomed") == dataset_id
        retried = client.wait(client.retry(job.id).id)
        assert retried.status is JobStatus.succeeded, retried.error
