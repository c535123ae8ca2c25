"""Augmentation of batches, on their device, one draw per image.

The draws of an epoch derive from (seed, epoch) and belong to samples, not to batches: whatever
the batch size and wherever training was resumed, an image is changed the same way. They stay on
the CPU, so that images are grouped by what they drew without waiting for the device. Pixels are
moved as bytes and changed by elementwise arithmetic or sums of integers: no image's result depends
on the images beside it. This file knows nothing of networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from skipline.catalog import CROP_PADDING_SHARE
from skipline.specs import (
    AugmentSpec,
    CutMix,
    Cutout,
    HorizontalFlip,
    Mixup,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    TrivialAugment,
)
from worker.engine.data import Purpose, epoch_generator

Draws = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Targets:
    """What a batch should be recognized as: `labels` int64 [B], and where images were mixed the
    labels of the `others` in them, int64 [B], and the `shares` of `labels`, float32 [B]."""

    labels: torch.Tensor
    others: torch.Tensor | None = None
    shares: torch.Tensor | None = None

    def loss(self, logits: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        """The mean cross-entropy of logits [B, C]: that with both labels, weighted by shares."""
        if self.others is None or self.shares is None:
            return functional.cross_entropy(logits, self.labels, label_smoothing=label_smoothing)
        own, other = (
            functional.cross_entropy(
                logits, labels, label_smoothing=label_smoothing, reduction="none"
            )
            for labels in (self.labels, self.others)
        )
        return (self.shares * own + (1 - self.shares) * other).mean()


class Augmentation:
    """A spec's `augment`. In whatever order it is named: crop and flip, the random operations,
    cutout, and, once the batch is normalized, mixing."""

    def __init__(
        self, specs: Sequence[AugmentSpec], image_size: int, channel_mean: Sequence[float]
    ) -> None:
        stages = (
            _crop(specs, image_size),
            _operations(specs, image_size),
            _cutout(specs, image_size, channel_mean),
        )
        self._stages: list[tuple[_Stage, slice]] = []
        self._num_columns = 0
        for stage in stages:
            if stage is not None:
                self._stages.append((stage, self._columns(stage)))
        self._mixing = _mixing(specs, image_size)
        self._mixing_columns = slice(0) if self._mixing is None else self._columns(self._mixing)

    def _columns(self, stage: _Drawn) -> slice:
        start = self._num_columns
        self._num_columns += stage.num_columns
        return slice(start, self._num_columns)

    def draw(self, seed: int, epoch: int, num_samples: int) -> torch.Tensor:
        """All that is random about each sample in this epoch: float32 [num_samples, K] on the CPU,
        with as many columns as the spec needs, possibly none."""
        generator = epoch_generator(seed, epoch, Purpose.augmentation)
        draws = np.empty((num_samples, self._num_columns), np.float32)
        for stage, columns in self._stages:
            draws[:, columns] = stage.draw(generator, num_samples)
        if self._mixing is not None:
            draws[:, self._mixing_columns] = self._mixing.draw(generator, num_samples)
        return torch.from_numpy(draws)

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Changes images uint8 [B, S, S, 3] by their rows [B, K] of the draws, on the CPU.

        Returns new images of the same kind, or those given if there is nothing to do."""
        for stage, columns in self._stages:
            images = stage(images, draws[:, columns])
        return images

    def mix(
        self, x: torch.Tensor, labels: torch.Tensor, draws: torch.Tensor
    ) -> tuple[torch.Tensor, Targets]:
        """Mixes a normalized batch x [B, 3, S, S] and its labels int64 [B] by the same draws.

        Returns x itself if there is no mixing; else a new batch in the same memory format."""
        if self._mixing is None:
            return x, Targets(labels)
        return self._mixing(x, labels, draws[:, self._mixing_columns])


class _Drawn(Protocol):
    @property
    def num_columns(self) -> int: ...

    def draw(self, generator: np.random.Generator, num_samples: int) -> Draws:
        """[num_samples, num_columns], of numbers that float32 holds."""


class _Stage(_Drawn, Protocol):
    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Changes images uint8 [B, S, S, 3] by draws float32 [B, num_columns] on the CPU."""


_Spec = TypeVar("_Spec")


def _find(specs: Sequence[AugmentSpec], kind: type[_Spec]) -> _Spec | None:
    return next((spec for spec in specs if isinstance(spec, kind)), None)


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The host goes on at once; a few kilobytes of any memory may be copied so."""
    return tensor.to(device, non_blocking=True)


def _image_starts(images: torch.Tensor, stride: int) -> torch.Tensor:
    """int64 [B, 1, 1]: where each image begins if it takes up `stride` places."""
    return (torch.arange(len(images), device=images.device) * stride).view(-1, 1, 1)


def _gather_pixels(pixels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of pixels [N, 3] at index int64 [B, H, W]: [B, H, W, 3]."""
    return pixels.index_select(0, index.flatten()).view(*index.shape, -1)


# Crops and flips


def _crop(specs: Sequence[AugmentSpec], image_size: int) -> _Stage | None:
    flips = _find(specs, HorizontalFlip) is not None
    if (resized := _find(specs, RandomResizedCrop)) is not None:
        return _ResizedCrop(resized.min_scale, flips, image_size)
    padding = 0
    if (crop := _find(specs, RandomCrop)) is not None:
        padding = image_size // CROP_PADDING_SHARE if crop.padding is None else crop.padding
    return _Crop(padding, flips) if padding or flips else None


class _Crop:
    """Pads with black and cuts a square of the old size anywhere; mirrors every other image.

    Draws the top and left of each crop in the padded image, and 1 if it is mirrored.
    """

    num_columns = 3

    def __init__(self, padding: int, flips: bool) -> None:
        self._padding, self._flips = padding, flips

    def draw(self, generator: np.random.Generator, num_samples: int) -> Draws:
        highest = [2 * self._padding, 2 * self._padding, int(self._flips)]
        return generator.integers(0, highest, (num_samples, 3), dtype=np.int16, endpoint=True)

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        batch_size, size, _, channels = images.shape
        side = size + 2 * self._padding
        if self._padding:
            inner = slice(self._padding, self._padding + size)
            padded = images.new_zeros((batch_size, side, side, channels))
            padded[:, inner, inner] = images
            images = padded
        top, left, mirrored = _send(draws, images.device).long().unsqueeze(-1).unbind(1)
        offsets = torch.arange(size, device=images.device)
        rows = top + offsets
        columns = left + torch.where(mirrored == 1, offsets.flip(0), offsets)
        index = (_image_starts(images, side * side) + rows[:, :, None] * side) + columns[:, None]
        return _gather_pixels(images.flatten(0, 2), index)


class _ResizedCrop:
    """Cuts out a box of `min_scale` to 1 of the area, with sides in a ratio of 3:4 to 4:3, and
    resizes it bilinearly, without antialiasing (Szegedy et al., 2015).

    Draws the top, left, height and width of each box, and 1 if it is mirrored. A box that does
    not fit in is drawn anew up to ten times; then it is the whole image.
    """

    num_columns = 5

    def __init__(self, min_scale: float, flips: bool, image_size: int) -> None:
        self._min_scale, self._flips, self._size = min_scale, flips, image_size

    def draw(self, generator: np.random.Generator, num_samples: int) -> Draws:
        size = self._size
        sides = np.full((num_samples, 2), size, np.int32)
        rows = np.arange(num_samples)
        for _ in range(10):
            area = size**2 * generator.uniform(self._min_scale, 1, len(rows))
            ratio = np.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3), len(rows)))
            drawn = np.rint(np.sqrt(np.stack([area / ratio, area * ratio], axis=1)))
            fits = (drawn > 0).all(axis=1) & (drawn <= size).all(axis=1)
            sides[rows[fits]] = drawn[fits]
            rows = rows[~fits]
        corners = generator.integers(0, size - sides, endpoint=True)
        mirrored = generator.integers(0, int(self._flips), num_samples, endpoint=True)
        return np.column_stack([corners, sides, mirrored])

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        batch_size, size, _, channels = images.shape
        top, left, height, width, mirrored = _send(draws, images.device).unsqueeze(-1).unbind(1)
        lines = torch.arange(batch_size * size, device=images.device).view(batch_size, size, 1)
        low, high, weight = (
            torch.where(mirrored == 1, each.flip(1), each) for each in self._neighbors(left, width)
        )
        first, second = (
            _gather_pixels(images.flatten(0, 2), lines * size + columns[:, None])
            .float()
            .view(batch_size, size, -1)
            for columns in (low, high)
        )
        narrowed = _between(first, second, weight.repeat_interleave(channels, dim=1)[:, None])
        low, high, weight = self._neighbors(top, height)
        first, second = (
            narrowed.flatten(0, 1).index_select(0, (lines[:, 0] + rows).flatten())
            for rows in (low, high)
        )
        resized = _between(first, second, weight.view(-1, 1))
        return _to_bytes(resized.round_()).view(images.shape)

    def _neighbors(
        self, start: torch.Tensor, length: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For each place of the result the two places beside it in the image, int64 [B, S], and
        the weight of the second; start and length of the boxes are float32 [B, 1]."""
        centers = torch.arange(self._size, device=start.device) + 0.5
        position = (centers * (length / self._size) - 0.5).clamp_(min=0)
        low = position.floor()
        high = torch.minimum(low + 1, length - 1)
        return (start + low).long(), (start + high).long(), position - low


def _between(first: torch.Tensor, second: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Overwrites `second`. Not `lerp`, which rounds otherwise in a vector than beside it."""
    return second.sub_(first).mul_(weight).add_(first)


def _to_bytes(levels: torch.Tensor) -> torch.Tensor:
    """Overwrites `levels`, of floats; cuts off what is behind the point, as torchvision does."""
    return levels.clamp_(0, 255).to(torch.uint8)


# Random operations


class Operation(IntEnum):
    """What RandAugment and TrivialAugment choose from. Those up to `sharpness` have a sign."""

    identity = 0
    shear_x = 1
    shear_y = 2
    translate_x = 3
    translate_y = 4
    rotate = 5
    brightness = 6
    color = 7
    contrast = 8
    sharpness = 9
    posterize = 10
    solarize = 11
    autocontrast = 12
    equalize = 13


NUM_MAGNITUDES = 31


def strength_table(image_size: int, *, wide: bool) -> npt.NDArray[np.float32]:
    """[14, 31]: the strength of each operation at each magnitude, by torchvision's ranges, for
    RandAugment or `wide` for TrivialAugment; 0 where the operation has none.

    In pixels for translations, degrees for rotations, bits that are left for posterize, shares of
    white for solarize, and else how much to add to a factor of 1.
    """
    shear, angle, factor, bits = (0.99, 135.0, 0.99, 6) if wide else (0.3, 30.0, 0.9, 4)
    shift = 32.0 if wide else 150 / 331 * image_size
    highest = {
        Operation.shear_x: shear,
        Operation.shear_y: shear,
        Operation.translate_x: shift,
        Operation.translate_y: shift,
        Operation.rotate: angle,
        Operation.brightness: factor,
        Operation.color: factor,
        Operation.contrast: factor,
        Operation.sharpness: factor,
    }
    table = torch.zeros(len(Operation), NUM_MAGNITUDES)
    for operation, value in highest.items():
        table[operation] = torch.linspace(0.0, value, NUM_MAGNITUDES)
    table[Operation.translate_x : Operation.translate_y + 1].trunc_()
    steps = torch.arange(NUM_MAGNITUDES)
    table[Operation.posterize] = (8 - steps / ((NUM_MAGNITUDES - 1) / bits)).round()
    table[Operation.solarize] = torch.linspace(1.0, 0.0, NUM_MAGNITUDES)
    return table.numpy()


def _operations(specs: Sequence[AugmentSpec], image_size: int) -> _Stage | None:
    if (rand_augment := _find(specs, RandAugment)) is not None:
        table = strength_table(image_size, wide=False)
        return _Operations(table, rand_augment.num_ops, rand_augment.magnitude)
    if _find(specs, TrivialAugment) is not None:
        return _Operations(strength_table(image_size, wide=True), 1, None)
    return None


class _Operations:
    """One random operation after the other (Cubuk et al., 2020), of one magnitude; or, where that
    is None, of a random one (Müller & Hutter, 2021).

    Draws the number and the signed strength of each operation.
    """

    def __init__(self, table: npt.NDArray[np.float32], num_ops: int, magnitude: int | None) -> None:
        self._table, self._magnitude = table, magnitude
        self.num_columns = 2 * num_ops

    def draw(self, generator: np.random.Generator, num_samples: int) -> Draws:
        shape = (num_samples, self.num_columns // 2)
        operations = generator.integers(len(Operation), size=shape, dtype=np.int8)
        if self._magnitude is None:
            magnitudes = generator.integers(NUM_MAGNITUDES, size=shape, dtype=np.int8)
            strengths = self._table[operations, magnitudes]
        else:
            strengths = self._table[operations, self._magnitude]
        is_negative = generator.integers(2, size=shape, dtype=np.int8) == 1
        np.negative(
            strengths, out=strengths, where=is_negative & (operations <= Operation.sharpness)
        )
        return np.stack([operations, strengths], axis=2).reshape(num_samples, -1)

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        columns = draws.unbind(1)
        for operations, strengths in zip(columns[::2], columns[1::2], strict=True):
            images = operate(images, operations, strengths)
        return images


def operate(
    images: torch.Tensor, operations: torch.Tensor, strengths: torch.Tensor
) -> torch.Tensor:
    """Does to each of images uint8 [B, S, S, 3] its operation at its strength, as torchvision's
    functions of that name do, with black where nothing was. [B] both, on the CPU."""
    changed = images.clone()
    for kind, change in _CHANGES.items():
        rows = torch.isin(operations, torch.tensor(kind)).nonzero().flatten()
        if len(rows):
            values = strengths[rows].view(-1, 1, 1, 1)
            if change is _move:
                values = _inverse_matrices(operations[rows], strengths[rows], images.shape[1])
            places = _send(rows, images.device)
            chosen = images.index_select(0, places)
            changed.index_copy_(0, places, change(chosen, _send(values, images.device)))
    return changed


_MOVES = (
    Operation.shear_x,
    Operation.shear_y,
    Operation.translate_x,
    Operation.translate_y,
    Operation.rotate,
)


def _move(images: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """The nearest pixel of the image, or black; matrices are those of `_inverse_matrices`."""
    size = images.shape[1]
    middle = (size - 1) / 2
    offsets = torch.arange(size, device=images.device) - middle
    columns, rows = (
        (by_x * offsets + (by_y * offsets[:, None] + shift)).add_(middle).round_().long()
        for by_x, by_y, shift in matrices.view(-1, 2, 3, 1, 1).permute(1, 2, 0, 3, 4)
    )
    outside = (rows < 0) | (rows >= size) | (columns < 0) | (columns >= size)
    pixels = torch.cat([images.flatten(0, 2), images.new_zeros((1, 3))])  # black is the last
    index = rows.mul_(size).add_(columns).add_(_image_starts(images, size * size))
    return _gather_pixels(pixels, index.masked_fill_(outside, len(pixels) - 1))


def _inverse_matrices(
    operations: torch.Tensor, strengths: torch.Tensor, image_size: int
) -> torch.Tensor:
    """float32 [B, 2, 3]: x and y of the pixel that comes to (x, y), from the middle of the image,
    as sums of x, y and 1 with these weights. Shears keep the upper left corner in its place."""
    matrices = torch.eye(2, 3, dtype=torch.float64).repeat(len(operations), 1, 1)
    strengths = strengths.double()
    shear_x, shear_y, translate_x, translate_y, rotate = (
        operations == operation for operation in _MOVES
    )
    corner = image_size / 2
    matrices[shear_x, 0, 1] = strengths[shear_x]
    matrices[shear_x, 0, 2] = strengths[shear_x] * corner
    matrices[shear_y, 1, 0] = strengths[shear_y]
    matrices[shear_y, 1, 2] = strengths[shear_y] * corner
    matrices[translate_x, 0, 2] = -strengths[translate_x]
    matrices[translate_y, 1, 2] = -strengths[translate_y]
    angles = torch.deg2rad(strengths[rotate])
    cosines, sines = angles.cos(), angles.sin()
    matrices[rotate, :, :2] = torch.stack([cosines, -sines, sines, cosines], dim=1).view(-1, 2, 2)
    return matrices.float()


def _brightness(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    return _to_bytes(images * (1 + strength))


def _color(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Away from each pixel's grey, or towards it."""
    return _to_bytes(images * (1 + strength) - _grey(images) * strength)


def _contrast(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Away from the image's mean grey, or towards it."""
    total = _grey(images).sum(dim=(1, 2, 3), dtype=torch.int64)  # exact, so in whatever order
    mean = total.float().div_(images.shape[1] * images.shape[2]).view(-1, 1, 1, 1)
    return _to_bytes(images * (1 + strength) - mean * strength)


def _grey(images: torch.Tensor) -> torch.Tensor:
    """Whole levels, float32 [B, S, S, 1], by the weights of ITU-R 601."""
    red, green, blue = images.unsqueeze(-1).unbind(-2)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor_()


def _sharpness(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Away from the mean of a pixel's neighborhood, in which it counts five times, or towards it;
    pixels at the border stay."""
    levels = images.short()
    lines = levels[:, :-2] + levels[:, 1:-1] + levels[:, 2:]
    boxes = lines[:, :, :-2] + lines[:, :, 1:-1] + lines[:, :, 2:]
    smooth = ((boxes + 4 * levels[:, 1:-1, 1:-1]) / 13).round_()
    sharp = images.float()
    inner = sharp[:, 1:-1, 1:-1]
    inner -= smooth.sub_(inner).mul_(strength)
    return _to_bytes(sharp)


def _posterize(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    num_lost_bits = 8 - strength.int()
    return images & (255 << num_lost_bits).to(torch.uint8)


def _solarize(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    return torch.where(images >= 255 * strength, 255 - images, images)


def _autocontrast(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Each channel from black to white; one of a single level stays."""
    darkest = images.amin(dim=(1, 2), keepdim=True).float()
    scale = (images.amax(dim=(1, 2), keepdim=True).float() - darkest) * (1 / 255)
    stretched = _to_bytes((images - darkest) / scale.masked_fill(scale == 0, 1))
    return torch.where(scale == 0, images, stretched)


def _equalize(images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """As many pixels at each level of a channel as can be, by Pillow's scheme, which leaves those
    at the brightest level out of account."""
    starts = 256 * torch.arange(3, device=images.device) + _image_starts(images, 3 * 256)
    entries = (images.flatten(1, 2).long() + starts).flatten()
    counts = torch.zeros(len(images) * 3 * 256, dtype=torch.int64, device=images.device)
    counts = counts.scatter_add_(0, entries, counts.new_ones(1).expand_as(entries)).view(-1, 3, 256)
    brightest = images.amax(dim=(1, 2)).long().unsqueeze(-1)
    step = (images.shape[1] * images.shape[2] - counts.gather(2, brightest)) // 255
    darker = counts.cumsum(dim=2) - counts
    equalized = ((darker + step // 2) // step.clamp(min=1)).clamp_(max=255)
    levels = torch.arange(256, device=images.device)
    table = torch.where(step == 0, levels, equalized).to(torch.uint8)
    return table.flatten().index_select(0, entries).view(images.shape)


Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes images uint8 [B, S, S, 3] and strengths float32 [B, 1, 1, 1], on the device."""

_CHANGES: Mapping[tuple[Operation, ...], Change] = {
    _MOVES: _move,
    (Operation.brightness,): _brightness,
    (Operation.color,): _color,
    (Operation.contrast,): _contrast,
    (Operation.sharpness,): _sharpness,
    (Operation.posterize,): _posterize,
    (Operation.solarize,): _solarize,
    (Operation.autocontrast,): _autocontrast,
    (Operation.equalize,): _equalize,
}
"""How each kind of operation changes the images that drew it."""


# Cutout


def _cutout(
    specs: Sequence[AugmentSpec], image_size: int, channel_mean: Sequence[float]
) -> _Stage | None:
    cutout = _find(specs, Cutout)
    if cutout is None:
        return None
    return _Cutout(cutout.size or image_size // 2, image_size, channel_mean)


class _Cutout:
    """Fills a square that is centred anywhere in the image, and may reach beyond it, with the
    channels' mean: after normalization that is the zero of DeVries & Taylor (2017).

    Draws the top and left of each square.
    """

    num_columns = 2

    def __init__(self, size: int, image_size: int, channel_mean: Sequence[float]) -> None:
        self._size, self._image_size = size, image_size
        self._fill = torch.tensor([round(255 * mean) for mean in channel_mean], dtype=torch.uint8)

    def draw(self, generator: np.random.Generator, num_samples: int) -> Draws:
        centers = generator.integers(self._image_size, size=(num_samples, 2), dtype=np.int16)
        return centers - self._size // 2

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        corners = _send(draws, images.device)
        hole = _within(torch.cat([corners, corners + self._size], dim=1), images.shape[1])
        return torch.where(hole.unsqueeze(-1), _send(self._fill, images.device), images)


def _within(boxes: torch.Tensor, image_size: int) -> torch.Tensor:
    """bool [B, S, S]: true within the box of each image, from top, left, bottom, right [B, 4]."""
    offsets = torch.arange(image_size, device=boxes.device)
    inside = (offsets >= boxes[:, :2, None]) & (offsets < boxes[:, 2:, None])
    rows, columns = inside.unbind(1)
    return rows[:, :, None] & columns[:, None, :]


# Mixing


def _mixing(specs: Sequence[AugmentSpec], image_size: int) -> _Mixing | None:
    mixup, cutmix = _find(specs, Mixup), _find(specs, CutMix)
    if mixup is None and cutmix is None:
        return None
    return _Mixing(mixup, cutmix, image_size)


class _Mixing:
    """Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019); with both, a coin decides for each
    image. Neighbors in the batch exchange: 0 and 1, 2 and 3; so even parts of a batch can be mixed
    on their own. The last image of an odd batch is left to itself.

    Draws the share of itself that an image keeps outside its box, and the top, left, bottom and
    right of the box that it takes from its neighbor: no box for mixup, a share of 1 for CutMix.
    """

    num_columns = 5

    def __init__(self, mixup: Mixup | None, cutmix: CutMix | None, image_size: int) -> None:
        self._mixup, self._cutmix, self._size = mixup, cutmix, image_size

    def draw(self, generator: np.random.Generator, num_samples: int) -> Draws:
        shares, boxes = np.ones(num_samples), np.zeros((num_samples, 4))
        if self._mixup is not None:
            shares = generator.beta(self._mixup.alpha, self._mixup.alpha, num_samples)
        if self._cutmix is not None:
            boxes = self._draw_boxes(generator, self._cutmix.alpha, num_samples)
        if self._mixup is not None and self._cutmix is not None:
            is_cutmix = generator.integers(2, size=num_samples, dtype=np.int8) == 1
            shares[is_cutmix] = 1
            boxes[~is_cutmix] = 0
        return np.column_stack([shares, boxes])

    def _draw_boxes(
        self, generator: np.random.Generator, alpha: float, num_samples: int
    ) -> npt.NDArray[np.float64]:
        """Boxes of 1 - Beta(alpha, alpha) of the area, centred anywhere, clipped at the border."""
        sides = self._size * np.sqrt(1 - generator.beta(alpha, alpha, (num_samples, 1)))
        reach = np.floor(sides / 2)
        centers = generator.integers(self._size, size=(num_samples, 2))
        return np.hstack([np.maximum(centers - reach, 0), np.minimum(centers + reach, self._size)])

    def __call__(
        self, x: torch.Tensor, labels: torch.Tensor, draws: torch.Tensor
    ) -> tuple[torch.Tensor, Targets]:
        kept, top, left, bottom, right = draws.unbind(1)
        shares = kept * (1 - (bottom - top) * (right - left) / self._size**2)
        draws = _send(draws, x.device)
        weights = draws[:, :1, None]
        if self._cutmix is not None:
            weights = weights * ~_within(draws[:, 1:], self._size)
        weights = weights.unsqueeze(1)
        mixed = _exchanged(x).mul_(1 - weights).add_(x * weights)
        return mixed, Targets(labels, _exchanged(labels), _send(shares, x.device))


def _exchanged(batch: torch.Tensor) -> torch.Tensor:
    """[B, ...] with neighbors in each other's place, in the same memory format."""
    num_paired = len(batch) // 2 * 2
    exchanged = torch.empty_like(batch)
    exchanged[0:num_paired:2] = batch[1:num_paired:2]
    exchanged[1:num_paired:2] = batch[0:num_paired:2]
    exchanged[num_paired:] = batch[num_paired:]
    return exchanged
