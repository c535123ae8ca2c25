"""Every environment variable of the service, typed, with its unit in its name.

Read once per process by `get_settings`; a file `.env` in the working directory is read too. The
client's own settings (`SKIPLINE_API_URL`, `SKIPLINE_API_KEY`) live in `skipline.client`.
"""

from __future__ import annotations

import os
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MEBIBYTE = 2**20
DEVICE_FILES = Path("/dev")


class Settings(BaseSettings):
    """`SKIPLINE_HOME` is `home`, and so on."""

    model_config = SettingsConfigDict(
        env_prefix="SKIPLINE_", env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True
    )

    home: Path = Path(".skipline")
    database_url: SecretStr | None = None
    broker_url: SecretStr | None = None
    artifacts_url: str | None = None
    api_key: SecretStr | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dataset_roots: Annotated[tuple[Path, ...], NoDecode] = ()
    """Folders below which datasets may be read by path, separated by `:`; by default the folder
    where the service was started."""
    log_format: Literal["auto", "text", "json"] = "auto"

    # How jobs are owned.
    lease_seconds: float = Field(60.0, ge=8, le=3600)
    renew_seconds: float = Field(15.0, gt=0, le=600)
    """At most a quarter of `lease_seconds`: a renewal or two may fail without losing the job."""
    control_seconds: float = Field(1.0, gt=0, le=60)
    """How often a supervisor looks whether its job should be cancelled."""
    idle_look_seconds: float = Field(2.0, gt=0, le=60)
    reap_seconds: float = Field(2.0, gt=0, le=60)
    grace_seconds: float = Field(30.0, gt=0, le=3600)
    """From SIGTERM to a worker, or from a cancel, until its trainers are killed."""
    max_crashes: int = Field(3, ge=1, le=100)
    """Crashed attempts in a row, without a new checkpoint, after which a job fails."""
    stall_warning_seconds: float = Field(300.0, gt=0)
    stall_failure_seconds: float = Field(3600.0, gt=0)
    """Without progress for so long a trainer counts as hung: a warning, then a failure."""
    warm_trainers: int = Field(1, ge=0, le=16)
    """Processes that a worker keeps ready with torch imported."""
    cpu_threads: int = Field(0, ge=0, le=1024)
    """Threads of one trainer on the CPU; 0 divides the cores among the slots."""

    # Where training reads images from.
    gpu_data_share: float = Field(0.5, ge=0, le=0.95)
    """Share of a GPU's free memory that a dataset may fill; a larger one stays on the disk."""
    max_packed_bytes: int = Field(64 * 1024 * MEBIBYTE, gt=0)
    """Packed, a dataset beyond this would take too much disk: it is decoded anew each epoch."""
    loader_processes: int = Field(0, ge=0, le=256)
    """That decode such a dataset; 0 takes as many as cores."""

    # Disk.
    reserved_disk_bytes: int = Field(256 * MEBIBYTE, ge=0)
    """Left free for the database by whoever writes checkpoints and datasets."""
    max_cache_bytes: int = Field(100 * 1024 * MEBIBYTE, ge=0)
    """Packed datasets beyond this are cleared away, those first that were used longest ago."""
    tidy_seconds: float = Field(600.0, gt=0, le=86_400)
    """How often a worker clears away what nobody needs any more."""

    # Limits of what a client can make grow.
    max_body_bytes: int = Field(64 * MEBIBYTE, gt=0)
    max_json_bytes: int = Field(MEBIBYTE, gt=0)
    max_image_pixels: int = Field(64_000_000, gt=0)
    max_predict_images: int = Field(64, gt=0)
    max_list_items: int = Field(1000, gt=0)
    max_metric_points: int = Field(100_000, gt=0)
    """Points that one answer of `GET /jobs/{id}/metrics` holds at most."""
    max_log_bytes: int = Field(MEBIBYTE, ge=MEBIBYTE // 4)
    """Of what the trainer of one attempt prints, the newest so many are kept."""
    max_queued_jobs: int = Field(10_000, gt=0)
    max_queued_jobs_per_key: int = Field(1000, gt=0)
    """Of those, posted with one key; without keys only `max_queued_jobs` holds."""
    max_streams: int = Field(1000, gt=0)
    max_upload_bytes: int = Field(20 * 1024 * MEBIBYTE, gt=0)
    max_uploads_per_key: int = Field(100, gt=0)
    """Of those that no job has read to its end; without keys, of all together."""
    upload_expiry_seconds: float = Field(24 * 3600.0, gt=0, le=90 * 24 * 3600)
    """An upload that is not taken up again for so long is deleted."""
    max_dataset_images: int = Field(5_000_000, gt=0)
    max_dataset_bytes: int = Field(200 * 1024 * MEBIBYTE, gt=0)
    max_dataset_classes: int = Field(10_000, gt=0)
    model_cache_bytes: int = Field(2048 * MEBIBYTE, gt=0)
    max_predict_waiting: int = Field(64, gt=0)
    """Predictions that wait for the model before the next one is told to come back later."""
    predict_max_wait_ms: float = Field(0.0, ge=0, le=2)
    """That an idle model waits for more images to go through it together."""
    predict_backend: Literal["auto", "torch"] = "auto"
    """`auto`: onnxruntime for models that are asked for often, if it is installed."""
    predict_timeout_seconds: float = Field(30.0, gt=0, le=600)
    """After which a prediction that is not answered is given up."""

    @field_validator("renew_seconds", "control_seconds")
    @classmethod
    def _well_within_a_lease(cls, value: float, info: ValidationInfo) -> float:
        if value > info.data.get("lease_seconds", value * 4) / 4:
            raise ValueError("must be at most a quarter of SKIPLINE_LEASE_SECONDS")
        return value

    @field_validator("dataset_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: object) -> object:
        return tuple(part for part in value.split(":") if part) if isinstance(value, str) else value

    @property
    def home_path(self) -> Path:
        return self.home.expanduser().absolute()

    @property
    def database(self) -> str:
        """SQLAlchemy's URL of the database."""
        if self.database_url is None:
            return f"sqlite:///{self.home_path / 'skipline.sqlite3'}"
        url = self.database_url.get_secret_value()
        for scheme in ("postgres://", "postgresql://"):
            if url.startswith(scheme):
                return "postgresql+psycopg://" + url.removeprefix(scheme)
        return url

    @property
    def broker(self) -> str:
        """The broker's URL; without one, messages are files below the home folder."""
        return self.broker_url.get_secret_value() if self.broker_url else "filesystem://localhost"

    @property
    def artifacts_path(self) -> Path:
        """The folder of checkpoints and datasets. Raises `ValueError` for anything but file://."""
        if self.artifacts_url is None:
            return self.home_path / "artifacts"
        parts = urlsplit(self.artifacts_url)
        if parts.scheme != "file" or parts.netloc:
            raise ValueError("SKIPLINE_ARTIFACTS_URL must be file:///a/folder that all share")
        return Path(unquote(parts.path))

    @property
    def cache_path(self) -> Path:
        """What can be made again: packed datasets, downloads."""
        return self.home_path / "cache"

    @property
    def resolved_dataset_roots(self) -> tuple[Path, ...]:
        return tuple(root.resolve() for root in self.dataset_roots) or (Path.cwd().resolve(),)


@cache
def get_settings() -> Settings:
    """The settings of this process."""
    return Settings()


def num_cores() -> int:
    """Cores that this process may use, which in a container can be fewer than the host's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cuda_is_present() -> bool:
    """True when this machine has a CUDA device, asked without importing torch."""
    return _num_cuda_devices() > 0


def num_gpus(settings: Settings) -> int:
    """GPUs that the jobs of this machine may use, counted without importing torch."""
    return 0 if settings.device == "cpu" else _num_cuda_devices()


def _num_cuda_devices() -> int:
    num_present = len(list(DEVICE_FILES.glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return num_present
    # As CUDA reads it: what comes after a device that does not exist is not there either.
    named = takewhile(lambda name: name.strip() not in ("", "-1"), visible.split(","))
    return min(num_present, len(list(named)))
