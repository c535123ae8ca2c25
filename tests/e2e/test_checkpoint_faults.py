"""Writing a checkpoint is killed at every point, and meets a disk that is full: what was registered
before stays whole, and is gone on from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from shared.storage import Storage
from skipline.schemas import JobStatus
from tests.e2e.conftest import (
    REPOSITORY,
    bring_in,
    draw_stripes,
    faulty,
    running_service,
    tiny_spec,
    wait_for,
)


def test_killed_wherever_it_is_a_writer_leaves_the_last_checkpoint_whole(
    tmp_path: Path, database_url: str
) -> None:
    url = database_url.replace("postgresql://", "postgresql+psycopg://")
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.checkpoint_writer", tmp_path, url],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    calls: list[str] = outcome["killed_at"]
    # Files, then their flushes, then the rename that shows them, then rows, then old files go.
    assert calls.count("fsync") == 6
    assert calls.count("os.rename") == calls.count("commit") == 1
    assert calls.index("os.rename") < calls.index("commit")
    assert calls.count("statement") > 5
    assert calls.count("os.remove") == 4
    # Killed before the commit: the old one. After it: the new one, whatever is left of the old.
    assert outcome["num_new"] == len(calls) - 1 - calls.index("commit") >= 5


def test_a_disk_that_fills_up_fails_the_job_and_a_retry_goes_on(tmp_path: Path) -> None:
    flag = tmp_path / "small-files"
    with (
        running_service(tmp_path, faulty(SKIPLINE_TEST_SMALL_FILES=str(flag))) as service,
        service.client() as client,
    ):
        stripes = draw_stripes(tmp_path)
        bring_in(client, stripes)
        job = client.submit(tiny_spec(epochs=8))
        wait_for(lambda: client.checkpoints(job.id), "checkpoint")
        flag.touch()
        [trainer] = service.trainers(job)
        os.kill(trainer, signal.SIGKILL)  # The next one cannot write large files.
        ended = client.wait(job.id)
        assert ended.error is not None
        assert (ended.status, ended.error.code, ended.attempt) == (
            *(JobStatus.failed, "disk_full"),
            2,
        )
        assert "retry" in ended.error.hint
        assert str(tmp_path) not in ended.error.model_dump_json()
        checkpoints = client.checkpoints(job.id)
        storage = Storage(service.home / "artifacts")
        assert list((storage.root / "staging").iterdir()) == []
        assert len(storage.keys(f"jobs/{job.id}")) == len({c.step for c in checkpoints})
        image = stripes / "test" / "down" / "000.png"
        assert client.predict([image], model=checkpoints[0].id).model.step == checkpoints[0].step

        flag.unlink()
        retried = client.wait(client.retry(job.id).id)
        assert (retried.status, retried.attempt) == (JobStatus.succeeded, 1), retried.error
        steps = [point.step for point in client.metrics(retried.id).series["train_loss"]]
        assert steps == list(range(2, 6 * 8 + 1, 2))
