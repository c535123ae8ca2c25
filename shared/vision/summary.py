"""What a network consists of, layer by layer, and what one image costs it.

Counts without computing: the network runs on the meta device, which knows shapes only. Nothing is
said here of time or of a device's memory; those are measured elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from skipline.schemas import LayerSummary, Summary

_FLOAT32_BYTES = 4
_BATCH_SIZE = 2
"""In training mode a batch norm takes no single value a channel."""


def summarize(model: nn.Module, image_size: int) -> Summary:
    """The layers of `model` in the order in which images of `image_size` pixels pass them; a layer
    that is passed twice is there twice.

    Leaves the model, its mode, its statistics and all random generators as they are.
    """
    recorder = _Recorder()
    was_training = {module: module.training for module in model.modules()}
    for module in was_training:
        module.training = True  # dropout then keeps its output, and statistics go to meta tensors
    handles = [
        layer.register_forward_hook(recorder.hook(name, layer))
        for name, layer in model.named_modules()
        if not any(layer.children())
    ]
    try:
        _run_on_meta(model, image_size)
    finally:
        _restore(was_training, handles)
    return Summary(
        layers=recorder.layers,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        multiply_adds=recorder.multiply_adds,
        forward_bytes=recorder.num_values * _FLOAT32_BYTES,
    )


def _run_on_meta(model: nn.Module, image_size: int) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    images = torch.empty(_BATCH_SIZE, 3, image_size, image_size, device="meta")
    with torch.no_grad():
        functional_call(model, shapes, (images,))


def _restore(was_training: dict[nn.Module, bool], handles: list[RemovableHandle]) -> None:
    for module, mode in was_training.items():
        module.training = mode
    for handle in handles:
        handle.remove()


class _Recorder:
    """Notes each layer that is passed; sums are for one image."""

    def __init__(self) -> None:
        self.layers: list[LayerSummary] = []
        self.multiply_adds = 0
        self.num_values = 0

    def hook(self, name: str, layer: nn.Module) -> Any:
        num_parameters = sum(parameter.numel() for parameter in layer.parameters())

        def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            shape = list(output.shape[1:])
            self.layers.append(
                LayerSummary(
                    name=name,
                    type=type(layer).__name__,
                    output_shape=shape,
                    num_parameters=num_parameters,
                )
            )
            num_values = output[0].numel()
            self.multiply_adds += num_values * _multiply_adds_a_value(layer)
            if not _shares_memory(output, inputs[0]):
                self.num_values += num_values

        return note


def _shares_memory(output: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether a layer works in place, passes on what it is given, or gives a view of it."""
    return output is given or (output._base is not None and output._base is given)


def _multiply_adds_a_value(layer: nn.Module) -> int:
    """How many a value of the layer's output takes; biases, norms and pools are not counted."""
    if isinstance(layer, nn.Conv2d):
        height, width = layer.kernel_size
        return layer.in_channels // layer.groups * height * width
    return layer.in_features if isinstance(layer, nn.Linear) else 0
