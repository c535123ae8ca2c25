"""How a job computes: what `auto` chose, stored with the job and kept when it resumes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from shared.errors import TrainingError


@dataclass(frozen=True)
class Runtime:
    """The same runtime on the same type of machine gives the same bits.

    `fp32` is IEEE's: TF32 stays off. `bf16` is autocast: weights and their updates stay float32.
    """

    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16"]
    num_threads: int
    """Threads of one operator on the CPU."""

    def to_json(self) -> dict[str, Any]:
        """`Runtime(**document)` is its inverse."""
        return asdict(self)

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    def activate(self, *, deterministic: bool = False) -> None:
        """Sets up this process: call it once, before anything is computed.

        Raises:
            TrainingError: `device_not_available`, as when a job resumes on another machine.
        """
        _require(self.device)
        torch.set_num_threads(self.num_threads)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:  # cuBLAS reads its variable when it starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")


def choose_runtime(
    precision: Literal["auto", "fp32", "bf16"],
    device: Literal["auto", "cpu", "cuda"],
    num_threads: int,
) -> Runtime:
    """What a spec's `precision` and `resources.device` mean on this machine.

    `auto` takes CUDA where there is some; there bf16, on the CPU fp32.

    Raises:
        TrainingError: `device_not_available`.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _require(device)
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    return Runtime(device, precision, num_threads)


def _require(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainingError(
            "device_not_available",
            "The job needs a CUDA GPU and this worker has none",
            "Set resources.device to auto or cpu, or start a worker on a machine with a GPU",
        )


@contextmanager
def typed_failures() -> Iterator[None]:
    """Gives torch's failures that a client can do something about a code and a hint."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "cuda_out_of_memory",
            "The GPU's memory does not hold the network at this batch size",
            "Halve batch_size (and optimizer.lr with it), or take a smaller image_size or network",
        ) from error
    except (RuntimeError, ValueError) as error:
        if "does not have a deterministic implementation" in str(error):
            raise TrainingError(
                "not_deterministic",
                "This network has a layer that the GPU cannot compute deterministically",
                "Set deterministic to false, or resources.device to cpu",
            ) from error
        if "Expected more than 1 value per channel" in str(error):
            raise TrainingError(
                "batch_too_small",
                "Batch norm cannot train on a single value per channel",
                "Use at least two images a batch, or larger images",
            ) from error
        raise
