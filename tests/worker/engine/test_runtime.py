from __future__ import annotations

import json
from typing import Literal

import pytest
import torch
import torch._dynamo
from torch import nn

from shared.errors import TrainingError
from worker.engine.runtime import Runtime, check_precision, choose_device, typed_failures


@pytest.fixture(params=[0])
def num_gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine with so many GPUs, by what torch says of it."""
    count: int = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    return count


@pytest.mark.parametrize(
    ("num_gpus", "num_processes", "device"),
    [(0, 1, "cpu"), (1, 1, "cuda"), (2, 2, "cuda"), (1, 2, "cpu")],
    indirect=["num_gpus"],
)
def test_auto_takes_gpus_where_there_are_enough(
    num_gpus: int, num_processes: int, device: str
) -> None:
    assert choose_device("auto", num_processes) == device


@pytest.mark.parametrize("num_gpus", [1], indirect=True)
def test_what_is_named_is_taken(num_gpus: int) -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device("cuda") == "cuda"


@pytest.mark.parametrize(
    ("num_gpus", "num_processes", "code"),
    [(0, 1, "device_not_available"), (1, 2, "not_enough_gpus")],
    indirect=["num_gpus"],
)
def test_gpus_that_are_not_there_are_a_typed_failure(
    num_gpus: int, num_processes: int, code: str
) -> None:
    for fails in (
        lambda: choose_device("cuda", num_processes),
        lambda: Runtime("cuda", "bf16", 1, num_processes=num_processes).activate(),
    ):
        with pytest.raises(TrainingError) as caught:
            fails()
        assert caught.value.code == code


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_what_the_cpu_cannot_compute_is_a_typed_failure(precision: Literal["tf32", "fp16"]) -> None:
    check_precision(precision, "cuda")
    with pytest.raises(TrainingError) as caught:
        check_precision(precision, "cpu")
    assert caught.value.code == "precision_not_supported"


def test_a_runtime_that_was_stored_before_there_were_more_choices_still_reads() -> None:
    stored = {"device": "cpu", "precision": "bf16", "num_threads": 2}
    assert Runtime(**stored) == Runtime("cpu", "bf16", 2, "mapped", False, 1)  # type: ignore[arg-type]


def test_a_runtime_survives_json() -> None:
    runtime = Runtime("cuda", "bf16", 4)
    assert Runtime(**json.loads(json.dumps(runtime.to_json()))) == runtime


def test_activating_sets_threads_and_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    Runtime("cpu", "fp32", 1).activate(deterministic=True)
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    Runtime("cpu", "fp32", 1).activate()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_autocast_computes_in_the_precision(precision: str, dtype: torch.dtype) -> None:
    with Runtime("cpu", precision, 1).autocast():  # type: ignore[arg-type]
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "cuda_out_of_memory"),
        (RuntimeError("x does not have a deterministic implementation"), "not_deterministic"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "cuda_out_of_memory"),
        (torch._dynamo.exc.TorchRuntimeError("no C++ compiler"), "compile_failed"),
        (ValueError("Expected more than 1 value per channel when training"), "batch_too_small"),
    ],
)
def test_failures_of_torch_get_a_code_and_a_hint(error: Exception, code: str) -> None:
    with pytest.raises(TrainingError) as caught, typed_failures():
        raise error
    assert caught.value.code == code
    assert caught.value.hint


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="a bug"), typed_failures():
        raise RuntimeError("a bug")
