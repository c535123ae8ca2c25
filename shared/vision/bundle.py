"""The serving bundle: all that is needed to use a trained network, in two files without pickle.

    model.safetensors   weights and batch-norm statistics
    bundle.json         what they are: spec, classes, preprocessing, dataset, metrics, versions

Knows nothing of where the folder comes from: storage keys, retention and manifests are others'.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
import safetensors.torch
import torch
import torchvision
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from shared.bundle_files import BUNDLE_FILE, WEIGHTS_FILE
from shared.errors import CheckpointCorrupt
from shared.vision.architectures import Network, build_model
from shared.vision.preprocessing import Preprocessing
from skipline.specs import TrainSpec

Weights = Mapping[str, torch.Tensor]
"""A model's state dict: parameters and buffers by name."""


def _library_versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BundleDataset(_Document):
    """The dataset that the network was trained on; `hash` identifies its content."""

    name: str
    id: str
    hash: str


class Bundle(_Document):
    """What `bundle.json` says. `spec` is resolved; `epoch` and `step` count from 1 and are those
    that the weights come from; `metrics` were measured with these weights."""

    format_version: Literal[1] = 1
    spec: TrainSpec
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    dataset: BundleDataset
    epoch: int
    step: int
    metrics: dict[str, float]
    versions: dict[str, str] = Field(default_factory=_library_versions)
    weights_sha256: str = ""
    """Of the file with the weights; `write_bundle` fills it in."""


def write_bundle(folder: Path, bundle: Bundle, weights: Weights) -> Bundle:
    """Writes both files into an existing folder; returns the bundle with the weights' hash."""
    data = safetensors.torch.save({name: w.cpu().contiguous() for name, w in weights.items()})
    bundle = bundle.model_copy(update={"weights_sha256": hashlib.sha256(data).hexdigest()})
    (folder / WEIGHTS_FILE).write_bytes(data)
    (folder / BUNDLE_FILE).write_text(bundle.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return bundle


def read_bundle(folder: Path) -> tuple[Bundle, dict[str, torch.Tensor]]:
    """Reads both files, the weights onto the CPU.

    Raises:
        CheckpointCorrupt: a file is missing, damaged, or does not belong to the other.
    """
    try:
        bundle = Bundle.model_validate_json((folder / BUNDLE_FILE).read_bytes())
        with (folder / WEIGHTS_FILE).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != bundle.weights_sha256:
            raise CheckpointCorrupt("The weights are not those that were written")
        return bundle, safetensors.torch.load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError as error:
        raise CheckpointCorrupt(f"The file {Path(error.filename).name} is missing") from error
    except (ValidationError, SafetensorError) as error:
        raise CheckpointCorrupt("The checkpoint does not read as one") from error


def restore_model(bundle: Bundle, weights: Weights, device: torch.device) -> Network:
    """The bundle's network with its weights, on `device`, in eval mode.

    Raises:
        CheckpointCorrupt: the weights are not of this network.
    """
    with torch.device("meta"):  # the weights are about to be replaced: draw none
        model = build_model(bundle.spec.model, len(bundle.classes), bundle.preprocessing.image_size)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointCorrupt("The weights are not those of the network") from error
    if bundle.spec.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.to(device).eval()
