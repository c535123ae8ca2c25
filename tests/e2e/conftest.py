"""Real services for end-to-end tests: `skipline up` in a process of its own, once on SQLite with
the file-system broker and once on PostgreSQL with Redis, and tiny real datasets."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.bundle_files import WEIGHTS_FILE
from shared.storage import Storage
from skipline import Skipline
from skipline.client import SkiplineError
from skipline.schemas import Job, JobStatus

PATIENCE_SECONDS = 120.0
REPOSITORY = Path(__file__).parents[2]


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    pytest.fail(f"No {what} within {seconds:.0f} s")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Service:
    """A `skipline up` with a home folder of its own."""

    home: Path
    environment: dict[str, str]
    num_slots: int = 1
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log_path(self) -> Path:
        return self.home.parent / "up.log"

    def client(self) -> Skipline:
        return Skipline(self.url)

    def start(self) -> Service:
        if self.process is not None:
            self.process.wait()
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "skipline", "up"),
                    *("--port", str(self.port), "--slots", str(self.num_slots)),
                ],
                env=self.environment,
                cwd=self.home.parent,
                stdout=log,
                stderr=log,
            )
        wait_for(self.is_ready, "service that is ready")
        return self

    def is_ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            pytest.fail(f"the service ended: {self.log_path.read_text()[-2000:]}")
        try:
            with self.client() as client:
                return client.ready().status == "ready"
        except SkiplineError:
            return False

    def stop(self) -> None:
        """As Ctrl-C does."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            assert self.process.wait(60) == 0, self.log_path.read_text()[-2000:]

    def processes(self, *words: str) -> list[int]:
        """The living processes of this service whose command line holds all `words`."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                environment = (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                is_zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            mine = f"SKIPLINE_HOME={self.home}".encode() in environment
            if mine and not is_zombie and all(word in command for word in words):
                found.append(int(entry.name))
        return found

    def trainers(self, job: Job) -> list[int]:
        """The process that trains: of all runners, the one that wrote the job's output file."""
        logs = list((self.home / "logs").glob(f"{job.id}.*.log"))
        found = []
        for pid in self.processes("worker.runner"):
            target = Path(f"/proc/{pid}/fd/1")
            try:
                if Path(os.readlink(target)) in logs:
                    found.append(pid)
            except OSError:
                continue
        return found


def faulty(**variables: str) -> dict[str, str]:
    """The variables of a service whose processes do as `tests/faults/sitecustomize.py` says."""
    return {"PYTHONPATH": str(REPOSITORY / "tests" / "faults"), **variables}


STACKS = ["sqlite+filesystem", "postgresql+redis"]


on_sqlite = pytest.mark.parametrize("shared_service", STACKS[:1], indirect=True, scope="session")
on_postgresql = pytest.mark.parametrize(
    "shared_service", STACKS[1:], indirect=True, scope="session"
)
"""For a test with a shared service that need not run on both stacks."""


@pytest.fixture(params=STACKS)
def stack(request: pytest.FixtureRequest) -> dict[str, str]:
    """The variables that choose database and broker."""
    return stack_variables(request)


def stack_variables(request: pytest.FixtureRequest) -> dict[str, str]:
    if request.param == "sqlite+filesystem":
        return {}
    return {
        "SKIPLINE_DATABASE_URL": request.getfixturevalue("new_postgres_schema")(),
        "SKIPLINE_BROKER_URL": request.getfixturevalue("redis_url"),
    }


@contextmanager
def running_service(
    folder: Path, variables: dict[str, str], *, warm_trainers: int = 0, num_slots: int = 1
) -> Iterator[Service]:
    """A service with its home below `folder`. At the end it is stopped, and must leave no process
    behind. A warm trainer costs a core for seconds at each start: only who tests the usual way has
    one."""
    home = folder / "home"
    others = {name: v for name, v in os.environ.items() if not name.startswith("SKIPLINE_")}
    environment = {
        **others,
        "SKIPLINE_HOME": str(home),
        "SKIPLINE_DATASET_ROOTS": str(folder),
        "SKIPLINE_GRACE_SECONDS": "20",
        "SKIPLINE_CPU_THREADS": "1",
        "SKIPLINE_WARM_TRAINERS": str(warm_trainers),
        **variables,
    }
    service = Service(home, environment, num_slots)
    try:
        service.start()
        yield service
        service.stop()
        wait_for(lambda: not service.processes(), "end of all processes", 30)
    finally:
        for pid in service.processes():
            os.kill(pid, signal.SIGKILL)
        if service.process is not None:
            service.process.wait()


@pytest.fixture
def service(
    request: pytest.FixtureRequest, tmp_path: Path, stack: dict[str, str]
) -> Iterator[Service]:
    """A service of the test's own."""
    is_usual = request.module.__name__.endswith("test_main_path")
    with running_service(tmp_path, stack, warm_trainers=int(is_usual)) as running:
        yield running


@pytest.fixture(scope="session", params=STACKS)
def shared_service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A service with one slot and the dataset `stripes`, for tests that kill nothing but trainers
    and leave no job behind that is not over."""
    folder = tmp_path_factory.mktemp("shared")
    with running_service(folder, stack_variables(request)) as running:
        with running.client() as client:
            bring_in(client, draw_stripes(folder))
        yield running


@pytest.fixture
def stripes(tmp_path: Path) -> Path:
    """See `draw_stripes`."""
    return draw_stripes(tmp_path)


def draw_stripes(folder: Path, seed: int = 0) -> Path:
    """A folder of real PNG files, 8x8: class `across` has horizontal stripes, `down` vertical
    ones, with seeded noise. 48 images to train on and 16 to test."""
    rng = np.random.default_rng(seed)
    rows = np.arange(8)
    for split, count in (("train", 24), ("test", 8)):
        for label in ("across", "down"):
            target = folder / "stripes" / split / label
            target.mkdir(parents=True)
            for number in range(count):
                wave = 128 + 100 * np.sin(rows * 1.6 + rng.uniform(0, 6))
                grid = (
                    np.tile(wave[:, None], (1, 8)) if label == "across" else np.tile(wave, (8, 1))
                )
                noisy = np.clip(grid + rng.normal(0, 10, (8, 8)), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).convert("RGB").save(target / f"{number:03}.png")
    return folder / "stripes"


def bring_in(client: Skipline, folder: Path, name: str = "stripes") -> str:
    """Ingests the folder; returns the dataset's id."""
    job = client.wait(client.add_dataset(path=folder, name=name).id)
    assert job.status is JobStatus.succeeded, job.error
    assert job.result is not None
    dataset_id: str = job.result["dataset_id"]
    return dataset_id


def tiny_spec(**keys: Any) -> dict[str, Any]:
    """A training that takes seconds: ResNet-18 on 8x8 pixels, six steps an epoch."""
    return {
        "kind": "train",
        "dataset": "stripes",
        "image_size": 8,
        "augment": ["random_crop"],
        "epochs": 3,
        "batch_size": 8,
        # Without momentum a checkpoint is half as large: writing it is what takes the time.
        "optimizer": {"lr": 0.05, "momentum": 0, "nesterov": False},
        "log_every_steps": 2,
        "precision": "fp32",  # `auto` would spend seconds on finding the fastest
        "seed": 1,
    } | keys


def final_weights(service: Service, client: Skipline, job: Job) -> bytes:
    """The file of the weights after the job's last step."""
    step = max(checkpoint.step for checkpoint in client.checkpoints(job.id))
    storage = Storage(service.home / "artifacts")
    [key] = [key for key in storage.keys(f"jobs/{job.id}") if key.endswith(f"/{step}")]
    return (storage.path(key) / WEIGHTS_FILE).read_bytes()
