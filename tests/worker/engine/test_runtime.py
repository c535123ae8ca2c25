from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from shared.errors import TrainingError
from worker.engine.runtime import Runtime, choose_runtime, typed_failures


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("_no_gpu")
def test_auto_is_fp32_on_the_cpu() -> None:
    assert choose_runtime("auto", "auto", 3) == Runtime("cpu", "fp32", 3)


@pytest.mark.usefixtures("_a_gpu")
def test_auto_is_bf16_on_a_gpu() -> None:
    assert choose_runtime("auto", "auto", 3) == Runtime("cuda", "bf16", 3)
    assert choose_runtime("auto", "cpu", 3) == Runtime("cpu", "fp32", 3)


@pytest.mark.usefixtures("_no_gpu")
def test_what_is_named_is_taken() -> None:
    assert choose_runtime("bf16", "cpu", 1) == Runtime("cpu", "bf16", 1)


@pytest.mark.usefixtures("_no_gpu")
def test_a_gpu_that_is_not_there_is_a_typed_failure() -> None:
    with pytest.raises(TrainingError) as caught:
        choose_runtime("auto", "cuda", 1)
    assert caught.value.code == "device_not_available"
    with pytest.raises(TrainingError, match="CUDA"):
        Runtime("cuda", "bf16", 1).activate()


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
