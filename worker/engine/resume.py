"""The file that a resumed training reads beside the weights. Never unpickles anything but tensors
and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shared.errors import CheckpointCorrupt

RESUME_FILE = "resume.pt"


def save_resume(path: Path, state: Mapping[str, Any]) -> None:
    """Writes what `TrainingCheckpoint.resume` holds.

    Raises:
        OSError: the disk is full, or does not write. Torch, given a path, would not say which.
    """
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # Its archive could not be ended after a write had failed.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_resume(path: Path) -> dict[str, Any]:
    """Reads what `save_resume` wrote, onto the CPU.

    Raises:
        CheckpointCorrupt: the file is missing or damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointCorrupt(f"The file {path.name} is missing") from error
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        raise CheckpointCorrupt("What resuming needs does not read as such") from error
    return state
