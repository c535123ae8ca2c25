"""How a job computes: what `auto` chose, stored with the job and kept when it resumes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from shared.errors import TrainingError
from worker.engine.data import DataPath

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]

_AUTOCAST: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """The same runtime on the same type of machine gives the same bits.

    `fp32` is IEEE's; `tf32` rounds the factors of a GPU's products to 10 bits. `bf16` and `fp16`
    are autocast: weights and their updates stay float32.
    """

    device: Device
    precision: Precision
    num_threads: int
    """Threads of one operator on the CPU, in each process."""
    data_path: DataPath = "mapped"
    compile: bool = False
    num_processes: int = 1

    def to_json(self) -> dict[str, Any]:
        """`Runtime(**document)` is its inverse."""
        return asdict(self)

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    def activate(self, *, deterministic: bool = False) -> None:
        """Sets up this process, before it computes anything that counts. The last call holds.

        Raises:
            TrainingError: `device_not_available`, `not_enough_gpus`, as when a job resumes on
                another machine.
        """
        require_device(self.device, self.num_processes)
        torch.set_num_threads(self.num_threads)
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:  # cuBLAS reads its variable when it starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        dtype = _AUTOCAST.get(self.precision)
        return torch.autocast(self.device, dtype or torch.bfloat16, enabled=dtype is not None)


def choose_device(device: Literal["auto", "cpu", "cuda"], num_processes: int = 1) -> Device:
    """What a spec's `resources` mean on this machine: `auto` takes CUDA where there is enough.

    Raises:
        TrainingError: `device_not_available`, `not_enough_gpus`.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.device_count() >= num_processes else "cpu"
    require_device(device, num_processes)
    return device


def check_precision(precision: Precision, device: Device) -> None:
    """Raises `TrainingError` `precision_not_supported` for what the device cannot do."""
    if device == "cpu" and precision in ("tf32", "fp16"):
        raise TrainingError(
            "precision_not_supported",
            f"{precision} needs a GPU and the job runs on the CPU",
            "Set precision to auto, fp32 or bf16, or resources.device to cuda",
        )


def require_device(device: Device, num_processes: int) -> None:
    """Raises as `choose_device` does."""
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise TrainingError(
            "device_not_available",
            "The job needs a CUDA GPU and this worker has none",
            "Set resources.device to auto or cpu, or start a worker on a machine with a GPU",
        )
    if torch.cuda.device_count() < num_processes:
        raise TrainingError(
            "not_enough_gpus",
            f"The job needs {num_processes} GPUs and this worker has {torch.cuda.device_count()}",
            "Lower resources.num_processes, or start a worker on a machine with more GPUs",
        )


def out_of_memory() -> TrainingError:
    """What to raise when the parts of a batch cannot be made smaller any more."""
    return TrainingError(
        "cuda_out_of_memory",
        "The GPU's memory does not hold the network, into however small parts a batch is cut",
        "Take a smaller image_size or network, or end what else uses the GPU. A batch is "
        "halved as long as its parts are even: a power of two as batch_size goes furthest",
    )


@contextmanager
def typed_failures() -> Iterator[None]:
    """Gives torch's failures that a client can do something about a code and a hint."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory() from error
    except (RuntimeError, ValueError) as error:
        if "STATUS_ALLOC_FAILED" in str(error):  # cuDNN's and cuBLAS's own memory
            raise out_of_memory() from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise TrainingError(
                "compile_failed",
                "The network could not be compiled on this worker",
                "Set compile to false, or install a C++ compiler there",
            ) from error
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
