"""Models in single files, to be used by other programs or by another Skipline.

    safetensors    the weights; what another Skipline takes in
    onnx, torchscript, torch_export    the whole way from squares of pixels to probabilities:
        `images` uint8 [B, S, S, 3] -> `probabilities` float32 [B, C]

Each file says in its metadata, under `skipline`, what it holds: a `Portable` as JSON. Run as a
program it writes a file: exporters are large, take every core, and are not made for threads, so
that a server had better not load them.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from shared.errors import BadModelFile, CheckpointCorrupt
from shared.vision.bundle import Bundle, Weights, read_bundle, restore_model
from shared.vision.folding import fold
from shared.vision.preprocessing import Normalizer
from skipline.schemas import ExportFormat, ModelOrigin

METADATA_KEY = "skipline"
EXTRA_FILE = f"{METADATA_KEY}.json"
"""Where torch's own formats keep it."""
OPSET = 20
"""Of ONNX: what onnxruntime has read since 1.17."""
CPU = torch.device("cpu")


class Portable(ModelOrigin):
    """What a file says of its model: all that its bundle says besides (classes, preprocessing, the
    whole spec). The report is in files alone that are to be taken in again. `weights_sha256` is
    that of `digest`."""

    format_version: Literal[1] = 1
    bundle: Bundle
    weights_sha256: str = ""


def digest(weights: Weights) -> str:
    """The SHA-256 of names, types, shapes and values, whatever file they lie in."""
    total = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].contiguous()
        total.update(f"{name}\t{weight.dtype}\t{tuple(weight.shape)}\n".encode())
        total.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def read_portable(path: Path) -> tuple[Portable, dict[str, torch.Tensor]]:
    """What `export` wrote as safetensors, with its weights.

    Raises:
        BadModelFile: it is no such file, it is damaged, or the weights are not of its network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            document = (file.metadata() or {}).get(METADATA_KEY)
            if document is None:
                raise BadModelFile("The file says nothing of a model of Skipline's")
            portable = Portable.model_validate_json(document)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if digest(weights) != portable.weights_sha256:
            raise BadModelFile("The weights are not those that were written: it is damaged")
        restore_model(portable.bundle, weights, CPU)
    except SafetensorError:
        raise BadModelFile("The file is no safetensors, or it is cut short") from None
    except ValidationError:
        raise BadModelFile("What the file says of its model cannot be understood") from None
    except CheckpointCorrupt as error:
        raise BadModelFile(error.detail) from None
    return portable, weights


class _Whole(nn.Module):
    """Everything from squares to calibrated probabilities."""

    def __init__(self, bundle: Bundle, weights: Weights, temperature: float) -> None:
        super().__init__()
        network = fold(restore_model(bundle, weights, CPU))
        self.network = network.to(memory_format=torch.contiguous_format)
        self._normalize = Normalizer(bundle.preprocessing, CPU, channels_last=False)
        self._temperature = temperature

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(self._normalize(images))
        return (logits / self._temperature).softmax(dim=1)


def export(portable: Portable, weights: Weights, format: ExportFormat, path: Path) -> None:
    """Writes one file. `onnx` needs the packages of the extra `onnx`.

    Raises:
        CheckpointCorrupt: the weights are not of the bundle's network.
    """
    if format == "safetensors":
        portable = portable.model_copy(update={"weights_sha256": digest(weights)})
        metadata = {METADATA_KEY: portable.model_dump_json()}
        safetensors.torch.save_file(dict(weights), path, metadata)
        return
    document = portable.model_copy(update={"report": None}).model_dump_json()
    bundle = portable.bundle
    whole = _Whole(bundle, weights, portable.model.temperature or 1.0).eval()
    size = bundle.preprocessing.image_size
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    any_batch = ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad():
        if format == "torchscript":
            with warnings.catch_warnings():
                # Deprecated for torch.export; what runs these files is in use everywhere.
                warnings.simplefilter("ignore")
                traced = torch.jit.trace(whole, example)  # type: ignore[no-untyped-call]
                torch.jit.save(traced, path, {EXTRA_FILE: document})
        elif format == "torch_export":
            program = torch.export.export(whole, (example,), dynamic_shapes=any_batch)
            torch.export.save(program, path, extra_files={EXTRA_FILE: document})
        else:
            converted = torch.onnx.export(
                whole,
                (example,),
                dynamo=True,
                dynamic_shapes=any_batch,
                input_names=["images"],
                output_names=["probabilities"],
                opset_version=OPSET,
                verbose=False,
            )
            assert converted is not None, "the exporter of torch.export returns a program"
            converted.model.metadata_props[METADATA_KEY] = document
            converted.save(path, external_data=False)


def main(folder: str, format: ExportFormat, path: str) -> None:
    """Exports the bundle in `folder`, of the `ModelOrigin` that comes in by standard input."""
    os.nice(10)  # What is waited for elsewhere comes first.
    torch.set_num_threads(1)
    bundle, weights = read_bundle(Path(folder))
    origin = ModelOrigin.model_validate_json(sys.stdin.read())
    portable = Portable(model=origin.model, report=origin.report, bundle=bundle)
    export(portable, weights, format, Path(path))


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
