"""Starting from weights that exist: an earlier model's, or torchvision's for ImageNet.

Knows nothing of where an earlier model is stored. Downloads nothing but ImageNet's weights, and
those only when asked for.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import torch
from torch import nn
from torchvision.models import get_model_weights

from shared.errors import TrainingError
from shared.vision.architectures import Network
from shared.vision.bundle import Weights

DOWNLOAD_TIMEOUT_SECONDS = 30.0
MAX_NAMES_TOLD = 3
"""An error names this many of the tensors that do not fit."""


def start_from(model: nn.Module, weights: Weights, head: str) -> list[str]:
    """Loads `weights` into `model` and returns the names of the tensors that stay as they are.

    `head` is the module that answers with the scores. Its last layer stays fresh where the number
    of classes differs, and all of it where `weights` have none of its layers, as ImageNet's have
    none of the head that a VGG has for small images.

    Raises:
        TrainingError: `weights_do_not_fit`; the model is then as it was.
    """
    own = model.state_dict()
    own_head = [name for name in own if _is_in(head, name)]
    if weights.keys().isdisjoint(own_head):
        fresh = own_head
        weights = {name: tensor for name, tensor in weights.items() if not _is_in(head, name)}
    else:
        last_layer = own_head[-1].rpartition(".")[0]
        fresh = [name for name in own_head if _is_in(last_layer, name) and name in weights]
        if all(weights[name].shape == own[name].shape for name in fresh):
            fresh = []
    taken = {name: tensor for name, tensor in weights.items() if name not in fresh}
    _require_fit({name: own[name] for name in own if name not in fresh}, taken)
    model.load_state_dict(taken, strict=False)
    return fresh


def _is_in(module: str, name: str) -> bool:
    return name.startswith(f"{module}.")


def _require_fit(own: Weights, taken: Weights) -> None:
    misfits = [f"{name} is missing" for name in own if name not in taken]
    misfits += [f"{name} is not of this network" for name in taken if name not in own]
    misfits += [
        f"{name} has the shape {list(taken[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in taken and taken[name].shape != own[name].shape
    ]
    if not misfits:
        return
    told = "; ".join(misfits[:MAX_NAMES_TOLD])
    rest = len(misfits) - MAX_NAMES_TOLD
    raise TrainingError(
        "weights_do_not_fit",
        f"The weights to start from are of another network: {told}"
        + (f"; and {rest} more" if rest > 0 else ""),
        "Take model.arch and model.stem from the training that model.init_from names; only the "
        "classes may differ",
    )


def imagenet_weights(arch: str, folder: Path) -> Weights:
    """torchvision's default weights of `arch`, from a file in `folder`, which is downloaded unless
    it is there already. Errors call `folder` a folder of the worker's cache.

    Raises:
        TrainingError: `download_failed`, `weights_damaged`.
    """
    url: str = get_model_weights(arch).DEFAULT.url
    file = folder / PurePosixPath(urlsplit(url).path).name
    hash_prefix = file.stem.rpartition("-")[2]  # of SHA-256, as torch.hub reads such names
    if not file.exists():
        _download(url, file, hash_prefix)
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    if not sha256.startswith(hash_prefix):
        raise TrainingError(
            "weights_damaged",
            f"The file {file.name} with ImageNet's weights is not the one that torchvision offers",
            f"Remove it from {_place(file)}, then retry the job",
        )
    return _with_counters(torch.load(file, map_location="cpu", weights_only=True))


def _download(url: str, file: Path, hash_prefix: str) -> None:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)  # torch's download sets none
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix, progress=False)
    except (OSError, HTTPException, RuntimeError):
        raise TrainingError(
            "download_failed",
            f"The file {file.name} with ImageNet's weights is not on this worker and could not be "
            "downloaded",
            f"Put {url} into {_place(file)}, then retry the job",
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _place(file: Path) -> str:
    return f"the folder {file.parent.name} of the worker's cache"


def _with_counters(weights: Weights) -> Weights:
    """Weights stored before batch norms counted their batches lack the counters, which say nothing
    here."""
    norms = [name.removesuffix("running_mean") for name in weights if name.endswith("running_mean")]
    return {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms} | dict(weights)


def freeze(model: Network, parts: Sequence[str]) -> None:
    """Ends the training of these modules: their parameters take no gradients, and they stay in eval
    mode, whatever mode `model` is put into, so that their norms keep their statistics."""
    for part in parts:
        model.get_submodule(part).requires_grad_(False)
    model.frozen_parts = tuple(parts)
    model.train(model.training)
