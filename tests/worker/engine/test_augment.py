from __future__ import annotations

import numpy as np
import torch

from worker.engine.augment import Augmentation

SIZE = 8  # pads by 1


def images(num_images: int) -> torch.Tensor:
    pixels = np.random.default_rng(0).integers(1, 256, (num_images, SIZE, SIZE, 3), dtype=np.uint8)
    return torch.from_numpy(pixels)


def by_hand(image: torch.Tensor, top: int, left: int, mirrored: int, padding: int) -> torch.Tensor:
    pixels = np.pad(image.numpy(), ((padding, padding), (padding, padding), (0, 0)))
    pixels = pixels[top : top + SIZE, left : left + SIZE]
    return torch.from_numpy(np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels))


def test_crop_and_flip_are_those_of_the_draws() -> None:
    augment, batch = Augmentation(["random_crop", "horizontal_flip"], SIZE), images(30)
    draws = augment.draw(0, 1, 30)
    cut = augment(batch, draws)
    assert cut.shape == batch.shape
    assert cut.dtype == torch.uint8
    for image, draw, result in zip(batch, draws.tolist(), cut, strict=True):
        assert torch.equal(result, by_hand(image, *draw, padding=1))


def test_draws_cover_their_whole_range_evenly() -> None:
    draws = Augmentation(["random_crop", "horizontal_flip"], 32).draw(0, 1, 9000).numpy()
    for column, highest in ((0, 8), (1, 8), (2, 1)):
        counts = np.bincount(draws[:, column])
        assert len(counts) == highest + 1
        np.testing.assert_allclose(counts, 9000 / (highest + 1), rtol=0.15)


def test_an_image_is_cut_the_same_in_any_batch() -> None:
    augment, data = Augmentation(["random_crop", "horizontal_flip"], SIZE), images(12)
    draws = augment.draw(5, 2, 12)
    whole = augment(data, draws)
    order = torch.tensor([7, 3, 11, 0])
    assert torch.equal(augment(data[order], draws[order]), whole[order])
    for index in range(12):
        alone = augment(data[index : index + 1], draws[index : index + 1])
        assert torch.equal(alone[0], whole[index])


def test_draws_derive_from_seed_and_epoch() -> None:
    augment = Augmentation(["random_crop", "horizontal_flip"], 32)
    draws = augment.draw(1, 1, 50)
    assert torch.equal(draws, augment.draw(1, 1, 50))
    assert not torch.equal(draws, augment.draw(1, 2, 50))
    assert not torch.equal(draws, augment.draw(2, 1, 50))


def test_only_what_is_named_is_done() -> None:
    data = images(20)
    nothing = Augmentation([], SIZE)
    assert torch.equal(nothing(data, nothing.draw(0, 1, 20)), data)
    flip = Augmentation(["horizontal_flip"], SIZE)
    flipped = flip(data, flip.draw(0, 1, 20))
    mirrored = [bool((a != b).any()) for a, b in zip(flipped, data, strict=True)]
    assert torch.equal(flipped[mirrored], data.flip(2)[mirrored])
    assert 0 < sum(mirrored) < 20
    crop = Augmentation(["random_crop"], SIZE)
    assert crop.draw(0, 1, 100)[:, 2].max() == 0


def test_the_result_lies_channels_last() -> None:
    augment = Augmentation(["random_crop", "horizontal_flip"], SIZE)
    cut = augment(images(4), augment.draw(0, 1, 4)).permute(0, 3, 1, 2)
    assert cut.is_contiguous(memory_format=torch.channels_last)
