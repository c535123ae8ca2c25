from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.worker.engine.tiny import Recorder, run_fit, tiny_spec
from worker.engine.events import TrainingCheckpoint

STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Of this process."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Forgetful(Recorder):
    """Keeps nothing but the memory in use after each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.resident: list[int] = []

    def metrics(self, values: Mapping[str, float], *, step: int, epoch: int) -> None:
        if "val_loss" in values:
            self.resident.append(resident_bytes())

    def save_checkpoint(self, checkpoint: TrainingCheckpoint) -> None:
        pass


@pytest.mark.skipif(not STATM.exists(), reason="memory is read from /proc, which is not here")
def test_memory_does_not_grow_with_the_epochs() -> None:
    sink = Forgetful()
    run_fit(
        tiny_spec(
            epochs=50,
            augment=["random_crop", "horizontal_flip", "rand_augment", "mixup"],
            ema_decay=0.9,
            accumulate_steps=2,
            gradient_clip_norm=1,
        ),
        sink=sink,
    )
    assert len(sink.resident) == 50
    assert sink.resident[49] - sink.resident[9] <= 4 * 2**20
