from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch.nn import functional
from torchvision.transforms.v2 import functional as vision

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
from worker.engine.augment import (
    NUM_MAGNITUDES,
    Augmentation,
    Operation,
    Targets,
    operate,
    strength_table,
)

SIZE = 8  # pads by 1
MEAN = (0.2, 0.5, 0.9)
DEFAULT = (RandomCrop(), HorizontalFlip())
PIPELINES: dict[str, tuple[AugmentSpec, ...]] = {
    "default": DEFAULT,
    "resized": (RandomResizedCrop(), HorizontalFlip()),
    "rand": (RandAugment(num_ops=3, magnitude=15),),
    "trivial": (*DEFAULT, TrivialAugment(), Cutout(size=3)),
    "all": (
        RandomResizedCrop(min_scale=0.2),
        HorizontalFlip(),
        RandAugment(),
        Cutout(),
        Mixup(),
        CutMix(),
    ),
}
every_pipeline = pytest.mark.parametrize("specs", PIPELINES.values(), ids=PIPELINES.keys())


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """On busy cores, threads wait for each other for longer than these pictures take."""
    torch.set_num_threads(1)


def images(num_images: int, size: int = SIZE) -> torch.Tensor:
    pixels = np.random.default_rng(0).integers(1, 256, (num_images, size, size, 3), dtype=np.uint8)
    return torch.from_numpy(pixels)


def augmentation(*specs: AugmentSpec, size: int = SIZE) -> Augmentation:
    return Augmentation(specs, size, MEAN)


# What is drawn


def test_draws_derive_from_seed_and_epoch() -> None:
    augment = augmentation(*PIPELINES["all"])
    draws = augment.draw(1, 1, 50)
    assert draws.dtype == torch.float32
    assert torch.equal(draws, augment.draw(1, 1, 50))
    for other in (augment.draw(1, 2, 50), augment.draw(2, 1, 50)):
        assert (draws != other).any(dim=0).all()


@every_pipeline
def test_an_image_is_changed_the_same_in_any_batch(specs: Sequence[AugmentSpec]) -> None:
    augment, data = augmentation(*specs), images(60)
    draws = augment.draw(5, 2, 60)
    whole = augment(data, draws)
    order = torch.tensor([7, 3, 51, 0])
    assert torch.equal(augment(data[order], draws[order]), whole[order])
    for index in range(60):
        alone = augment(data[index : index + 1], draws[index : index + 1])
        assert torch.equal(alone[0], whole[index])


@every_pipeline
def test_all_of_it_is_deterministic_and_leaves_its_input_alone(
    specs: Sequence[AugmentSpec],
) -> None:
    torch.use_deterministic_algorithms(True)
    augment, data = augmentation(*specs), images(40)
    kept, draws = data.clone(), augment.draw(0, 1, 40)
    changed = augment(data, draws)
    assert torch.equal(data, kept)
    assert not torch.equal(changed, data)
    assert torch.equal(augment(data, draws), changed)


@every_pipeline
def test_the_result_lies_channels_last(specs: Sequence[AugmentSpec]) -> None:
    augment = augmentation(*specs)
    changed = augment(images(6), augment.draw(0, 1, 6))
    assert changed.dtype == torch.uint8
    assert changed.shape == (6, SIZE, SIZE, 3)
    assert changed.permute(0, 3, 1, 2).is_contiguous(memory_format=torch.channels_last)


def test_the_order_of_the_spec_does_not_matter() -> None:
    specs, data = PIPELINES["all"], images(30)
    forwards, backwards = augmentation(*specs), augmentation(*specs[::-1])
    draws = forwards.draw(0, 1, 30)
    assert torch.equal(draws, backwards.draw(0, 1, 30))
    assert torch.equal(forwards(data, draws), backwards(data, draws))


def test_nothing_is_drawn_and_done_where_nothing_is_named() -> None:
    augment, data = augmentation(), images(20)
    draws = augment.draw(0, 1, 20)
    assert draws.shape == (20, 0)
    assert augment(data, draws) is data
    x, labels = torch.zeros(20, 3, SIZE, SIZE), torch.arange(20)
    mixed, targets = augment.mix(x, labels, draws)
    assert mixed is x
    assert targets == Targets(labels)


# Crops and flips


def cut_by_hand(image: torch.Tensor, top: int, left: int, mirrored: int, pad: int) -> torch.Tensor:
    pixels = np.pad(image.numpy(), ((pad, pad), (pad, pad), (0, 0)))
    pixels = pixels[top : top + SIZE, left : left + SIZE]
    return torch.from_numpy(np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels))


@pytest.mark.parametrize(("crop", "pad"), [(RandomCrop(), 1), (RandomCrop(padding=3), 3)])
def test_crop_and_flip_are_those_of_the_draws(crop: RandomCrop, pad: int) -> None:
    augment, batch = augmentation(crop, HorizontalFlip()), images(30)
    draws = augment.draw(0, 1, 30)
    assert draws[:, :2].max() == 2 * pad
    for image, draw, result in zip(batch, draws.int().tolist(), augment(batch, draws), strict=True):
        assert torch.equal(result, cut_by_hand(image, *draw, pad=pad))


def test_crops_and_flips_cover_their_whole_range_evenly() -> None:
    draws = augmentation(*DEFAULT, size=32).draw(0, 1, 9000).int().numpy()
    for column, highest in ((0, 8), (1, 8), (2, 1)):
        counts = np.bincount(draws[:, column])
        assert len(counts) == highest + 1
        np.testing.assert_allclose(counts, 9000 / (highest + 1), rtol=0.15)


def test_only_what_is_named_is_done() -> None:
    data = images(20)
    flip = augmentation(HorizontalFlip())
    flipped = flip(data, flip.draw(0, 1, 20))
    mirrored = [bool((a != b).any()) for a, b in zip(flipped, data, strict=True)]
    assert torch.equal(flipped[mirrored], data.flip(2)[mirrored])
    assert 0 < sum(mirrored) < 20
    crop = augmentation(RandomCrop())
    assert crop.draw(0, 1, 100)[:, 2].max() == 0
    resized = augmentation(RandomResizedCrop())
    assert resized.draw(0, 1, 100)[:, 4].max() == 0


def test_a_resized_crop_is_torchvisions() -> None:
    size, augment = 20, augmentation(RandomResizedCrop(min_scale=0.05), HorizontalFlip(), size=20)
    data, draws = images(60, size), augment.draw(0, 1, 60)
    result = augment(data, draws)
    for image, draw, cut in zip(data, draws.int().tolist(), result, strict=True):
        top, left, height, width, mirrored = draw
        expected = vision.resized_crop(
            image.permute(2, 0, 1), top, left, height, width, [size, size], antialias=False
        ).permute(1, 2, 0)
        expected = expected.flip(1) if mirrored else expected
        assert (cut.int() - expected.int()).abs().max() <= 1


def test_boxes_to_resize_lie_within_the_image_and_have_the_area_asked_for() -> None:
    top, left, height, width, _ = (
        augmentation(RandomResizedCrop(min_scale=0.25), size=100).draw(0, 1, 4000).numpy().T
    )
    assert min(top.min(), left.min()) == 0
    assert (top + height).max() == (left + width).max() == 100
    area, ratio = height * width / 100**2, width / height
    assert 0.24 < area.min() < 0.27  # sides are rounded
    assert area.max() > 0.9
    assert 0.74 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 1.36
    assert np.median(np.log(ratio)) == pytest.approx(0, abs=0.02)


def test_a_box_that_never_fits_is_the_whole_image() -> None:
    draws = augmentation(RandomResizedCrop(min_scale=1), size=100).draw(0, 1, 2000)
    whole = (draws[:, :4] == torch.tensor([0.0, 0.0, 100.0, 100.0])).all(dim=1)
    assert whole.float().mean() > 0.9


# Random operations


def test_strengths_are_those_of_torchvision() -> None:
    rand, trivial = strength_table(224, wide=False), strength_table(224, wide=True)
    worked_out = {
        Operation.identity: (0, 0),
        Operation.shear_x: (0.09, 0.297),
        Operation.shear_y: (0.09, 0.297),
        Operation.translate_x: (30, 9),  # 0.3 · 224 · 150/331 = 30.45, and 0.3 · 32 = 9.6
        Operation.translate_y: (30, 9),
        Operation.rotate: (9, 40.5),
        Operation.brightness: (0.27, 0.297),
        Operation.color: (0.27, 0.297),
        Operation.contrast: (0.27, 0.297),
        Operation.sharpness: (0.27, 0.297),
        Operation.posterize: (7, 6),  # 8 - 0.3 · 4 = 6.8, and 8 - 0.3 · 6 = 6.2
        Operation.solarize: (0.7, 0.7),
        Operation.autocontrast: (0, 0),
        Operation.equalize: (0, 0),
    }
    assert len(worked_out) == len(rand) == len(trivial) == 14
    for operation, strengths in worked_out.items():
        drawn = rand[operation, 9], trivial[operation, 9]
        assert drawn == pytest.approx(strengths, rel=1e-6)
    assert trivial[Operation.rotate, 30] == 135
    assert rand[Operation.posterize, 30] == 4


def test_operations_are_drawn_evenly_and_their_signs_by_a_coin() -> None:
    num_samples = 14_000
    draws = augmentation(RandAugment(num_ops=2, magnitude=9)).draw(0, 1, num_samples).numpy()
    table = strength_table(SIZE, wide=False)[:, 9]
    assert not np.array_equal(draws[:, 0], draws[:, 2])
    for operations, strengths in (draws[:, :2].T, draws[:, 2:].T):
        operations = operations.astype(int)
        np.testing.assert_allclose(np.bincount(operations), num_samples / 14, rtol=0.15)
        np.testing.assert_array_equal(np.abs(strengths), table[operations])
        for operation in Operation:
            is_negative = strengths[operations == operation] < 0
            is_signed = Operation.shear_x <= operation <= Operation.sharpness
            expected = 0.5 if is_signed and table[operation] else 0
            assert is_negative.mean() == pytest.approx(expected, abs=0.06)


def test_trivial_augment_draws_magnitudes_evenly() -> None:
    operations, strengths = augmentation(TrivialAugment()).draw(0, 1, 62_000).numpy().T
    np.testing.assert_allclose(np.bincount(operations.astype(int)), 62_000 / 14, rtol=0.1)
    counts = np.unique(strengths[operations == Operation.solarize], return_counts=True)[1]
    assert len(counts) == NUM_MAGNITUDES
    np.testing.assert_allclose(counts, 62_000 / 14 / 31, rtol=0.35)


def test_rand_augment_does_one_operation_after_the_other() -> None:
    augment, data = augmentation(RandAugment(num_ops=2, magnitude=20)), images(50)
    draws = augment.draw(0, 1, 50)
    once = operate(data, draws[:, 0], draws[:, 1])
    assert torch.equal(augment(data, draws), operate(once, draws[:, 2], draws[:, 3]))


def shear(image: torch.Tensor, x: float, y: float) -> torch.Tensor:
    degrees = [math.degrees(math.atan(tangent)) for tangent in (x, y)]
    return vision.affine(image, 0.0, [0, 0], 1.0, degrees, center=[0, 0])


def shift(image: torch.Tensor, x: float, y: float) -> torch.Tensor:
    return vision.affine(image, 0.0, [int(x), int(y)], 1.0, [0.0, 0.0])


REFERENCE: dict[Operation, Callable[[torch.Tensor, float], torch.Tensor]] = {
    Operation.identity: lambda image, strength: image,
    Operation.shear_x: lambda image, strength: shear(image, strength, 0),
    Operation.shear_y: lambda image, strength: shear(image, 0, strength),
    Operation.translate_x: lambda image, strength: shift(image, strength, 0),
    Operation.translate_y: lambda image, strength: shift(image, 0, strength),
    Operation.rotate: vision.rotate,
    Operation.brightness: lambda image, strength: vision.adjust_brightness(image, 1 + strength),
    Operation.color: lambda image, strength: vision.adjust_saturation(image, 1 + strength),
    Operation.contrast: lambda image, strength: vision.adjust_contrast(image, 1 + strength),
    Operation.sharpness: lambda image, strength: vision.adjust_sharpness(image, 1 + strength),
    Operation.posterize: lambda image, strength: vision.posterize(image, int(strength)),
    Operation.solarize: lambda image, strength: vision.solarize(image, 255 * strength),
    Operation.autocontrast: lambda image, strength: vision.autocontrast(image),
    Operation.equalize: lambda image, strength: vision.equalize(image),
}
SIGNED = range(Operation.shear_x, Operation.sharpness + 1)
SLANTED = (Operation.shear_x, Operation.shear_y, Operation.rotate)


def pictures(num_pictures: int, size: int) -> torch.Tensor:
    """Noise, in turn of all levels, of a few dark ones, and with a channel of one level only."""
    data = images(num_pictures, size)
    data[1::3] = data[1::3] // 4 + 20
    data[2::3, :, :, 1] = 77
    return data


@pytest.mark.parametrize("size", [32, 45])
@pytest.mark.parametrize("wide", [False, True], ids=["rand", "trivial"])
@pytest.mark.parametrize("operation", Operation)
def test_an_operation_is_torchvisions(operation: Operation, wide: bool, size: int) -> None:
    """Pixels may differ by a level where torchvision multiplies and adds at once; and where two
    are equally near, either will do: a strength beside this one tells which they are."""
    strengths = torch.from_numpy(strength_table(size, wide=wide)[operation])
    if operation in SIGNED:
        strengths = torch.cat([strengths, -strengths])
    data = pictures(len(strengths), size)
    results = operate(data, torch.full(strengths.shape, float(operation)), strengths)
    most = 1 if operation in (Operation.color, Operation.contrast, Operation.sharpness) else 0
    beside = (1, 1 - 1e-5, 1 + 1e-5) if operation in SLANTED else (1,)
    for image, strength, result in zip(data, strengths.tolist(), results, strict=True):
        differences = [
            (REFERENCE[operation](image.permute(2, 0, 1), strength * factor).int())
            .sub(result.permute(2, 0, 1))
            .abs()
            for factor in beside
        ]
        assert torch.stack(differences).amin(dim=0).max() <= most


def test_a_picture_of_one_level_stays_as_it_is_when_it_is_stretched() -> None:
    grey = torch.full((2, SIZE, SIZE, 3), 77, dtype=torch.uint8)
    operations = torch.tensor([float(Operation.autocontrast), float(Operation.equalize)])
    assert torch.equal(operate(grey, operations, torch.zeros(2)), grey)


# Cutout


def test_cutout_fills_its_square_with_the_mean() -> None:
    augment, data = augmentation(Cutout(size=3)), images(60)
    draws = augment.draw(0, 1, 60)
    expected = data.clone()
    for image, (top, left) in zip(expected, draws.int().tolist(), strict=True):
        image[max(top, 0) : top + 3, max(left, 0) : left + 3] = torch.tensor(
            [51, 128, 230], dtype=torch.uint8
        )  # 0.2, 0.5 and 0.9 of 255, rounded
    assert torch.equal(augment(data, draws), expected)


@pytest.mark.parametrize(("size", "lowest", "highest"), [(3, -1, 6), (4, -2, 5), (None, -2, 5)])
def test_cutout_is_centred_anywhere(size: int | None, lowest: int, highest: int) -> None:
    corners = augmentation(Cutout(size=size)).draw(0, 1, 8000).int().numpy()
    for column in corners.T:
        values, counts = np.unique(column, return_counts=True)
        assert values.tolist() == list(range(lowest, highest + 1))
        np.testing.assert_allclose(counts, 1000, rtol=0.15)


def test_cutout_comes_after_the_operations() -> None:
    augment = augmentation(Cutout(size=SIZE), RandAugment(magnitude=30))
    draws = augment.draw(0, 1, 30)
    draws[:, -2:] = 0  # the whole image
    filled = augment(images(30), draws)
    assert (filled == torch.tensor([51, 128, 230])).all()


# Mixing


def normalized(num_images: int) -> torch.Tensor:
    x = torch.randn((num_images, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    return x.to(memory_format=torch.channels_last)


def test_mixup_adds_shares_of_neighbors() -> None:
    augment, x = augmentation(Mixup(alpha=1.0)), normalized(4)
    draws = augment.draw(0, 1, 4)
    draws[:, 0] = torch.tensor([0.75, 0.5, 1.0, 0.0])
    mixed, targets = augment.mix(x, torch.tensor([5, 6, 7, 8]), draws)
    torch.testing.assert_close(mixed[0], 0.75 * x[0] + 0.25 * x[1])
    torch.testing.assert_close(mixed[1], 0.5 * x[1] + 0.5 * x[0])
    assert torch.equal(mixed[2], x[2])
    assert torch.equal(mixed[3], x[2])
    assert targets.labels.tolist() == [5, 6, 7, 8]
    assert targets.others is not None
    assert targets.shares is not None
    assert targets.others.tolist() == [6, 5, 8, 7]
    assert targets.shares.tolist() == [0.75, 0.5, 1.0, 0.0]


def test_cutmix_pastes_a_box_of_the_neighbor() -> None:
    augment, x = augmentation(CutMix()), normalized(2)
    draws = torch.tensor([[1.0, 2, 0, 6, 4], [1.0, 0, 0, 0, 0]])  # top, left, bottom, right
    mixed, targets = augment.mix(x, torch.tensor([5, 6]), draws)
    expected = x.clone()
    expected[0, :, 2:6, 0:4] = x[1, :, 2:6, 0:4]
    assert torch.equal(mixed, expected)
    assert targets.shares is not None
    assert targets.shares.tolist() == [1 - 16 / 64, 1.0]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_shares_of_mixup_are_beta_distributed(alpha: float) -> None:
    shares = augmentation(Mixup(alpha=alpha)).draw(0, 1, 20_000)[:, 0]
    assert shares.mean() == pytest.approx(0.5, abs=0.01)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


def test_boxes_of_cutmix_have_their_area_and_are_clipped() -> None:
    draws = augmentation(CutMix(), size=1000).draw(0, 1, 5000)
    assert (draws[:, 0] == 1).all()
    top, left, bottom, right = draws[:, 1:].numpy().T
    assert min(top.min(), left.min()) == 0
    assert max(bottom.max(), right.max()) == 1000
    inside = (top > 0) & (left > 0) & (bottom < 1000) & (right < 1000)
    assert ((bottom - top) == (right - left))[inside].all()
    area = (bottom - top) * (right - left) / 1000**2
    # Uniform shares u: a side of √u keeps √u - u/4 of its length on average, both sides are alike
    # and independent, so the area's mean is that of (√u - u/4)²: 1/2 - 1/5 + 1/48.
    assert area.mean() == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.01)


def test_a_coin_decides_between_mixup_and_cutmix() -> None:
    draws = augmentation(Mixup(alpha=1.0), CutMix(), size=1000).draw(0, 1, 4000)
    has_share, has_box = draws[:, 0] < 1, draws[:, 3] > 0
    assert not (has_share & has_box).any()
    assert has_share.float().mean() == pytest.approx(0.5, abs=0.03)
    assert has_box.float().mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("specs", [[Mixup()], [CutMix()], [Mixup(), CutMix()]])
def test_even_parts_of_a_batch_are_mixed_as_the_whole(specs: list[AugmentSpec]) -> None:
    augment, x, labels = augmentation(*specs), normalized(11), torch.arange(11)
    draws, kept = augment.draw(0, 1, 11), x.clone()
    mixed, targets = augment.mix(x, labels, draws)
    assert torch.equal(x, kept)
    assert not torch.equal(mixed, x)
    for rows in (slice(0, 4), slice(4, 6), slice(6, 11)):
        part, part_targets = augment.mix(x[rows], labels[rows], draws[rows])
        assert torch.equal(part, mixed[rows])
        for name in ("labels", "others", "shares"):
            assert torch.equal(getattr(part_targets, name), getattr(targets, name)[rows])


def test_the_last_of_an_odd_batch_stays_as_it_is() -> None:
    augment, x = augmentation(Mixup(alpha=1.0), CutMix()), normalized(3)
    mixed, targets = augment.mix(x, torch.tensor([5, 6, 7]), augment.draw(0, 1, 3))
    torch.testing.assert_close(mixed[2], x[2])
    assert targets.others is not None
    assert targets.others.tolist() == [6, 5, 7]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_mixing_keeps_the_memory_format(memory_format: torch.memory_format) -> None:
    augment = augmentation(Mixup(), CutMix())
    x = normalized(5).contiguous(memory_format=memory_format)
    mixed, _ = augment.mix(x, torch.arange(5), augment.draw(0, 1, 5))
    assert mixed.is_contiguous(memory_format=memory_format)


# Targets


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_soft_targets(label_smoothing: float) -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [1.0, 1.0, -2.0]])
    labels, others = torch.tensor([0, 1, 2]), torch.tensor([1, 1, 0])
    shares = torch.tensor([0.75, 0.5, 0.0])
    soft = torch.tensor([[0.75, 0.25, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(
        Targets(labels, others, shares).loss(logits, label_smoothing),
        functional.cross_entropy(logits, soft, label_smoothing=label_smoothing),
    )
    assert torch.equal(
        Targets(labels).loss(logits, label_smoothing),
        functional.cross_entropy(logits, labels, label_smoothing=label_smoothing),
    )


def test_the_loss_of_a_batch_is_the_mean_of_its_parts() -> None:
    logits = torch.randn((6, 4), generator=torch.Generator().manual_seed(0))
    labels, others = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1, 0, 3, 2, 1, 0])
    shares = torch.linspace(0, 1, 6)
    parts = [
        Targets(labels[rows], others[rows], shares[rows]).loss(logits[rows], 0.1)
        for rows in (slice(0, 3), slice(3, 6))
    ]
    whole = Targets(labels, others, shares).loss(logits, 0.1)
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
