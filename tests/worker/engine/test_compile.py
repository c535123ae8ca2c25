from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.worker.engine.tiny import NUM_CLASSES, RUNTIME, run_fit, tiny_spec

COMPILERS = ("g++", "clang++", "c++")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(16, NUM_CLASSES)
    )


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no C++ compiler here")
def test_a_compiled_network_learns_as_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    spec = tiny_spec(epochs=2, ema_decay=0.5)
    plain = run_fit(spec, model=model())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler uses what torch deprecates
        compiled = run_fit(spec, model=model(), runtime=replace(RUNTIME, compile=True))
    assert any(tmp_path.rglob("*.so")), "nothing was compiled"
    for name in ("train_loss", "val_loss"):
        assert compiled.sink.values(name) == pytest.approx(plain.sink.values(name), rel=1e-4)
    # What is stored bears the names of the network as it is.
    assert compiled.sink.checkpoints[-1].weights.keys() == plain.weights.keys()
