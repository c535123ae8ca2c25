from __future__ import annotations

import torch

from shared.vision.preprocessing import Normalizer, Preprocessing


def test_normalizing_gives_zero_mean_and_unit_variance() -> None:
    preprocessing = Preprocessing(
        image_size=2, channel_mean=(0.0, 0.5, 0.2), channel_std=(1.0, 0.25, 0.1)
    )
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).expand(4, 2, 2, 3).contiguous()
    x = Normalizer(preprocessing, torch.device("cpu"))(images)
    assert x.shape == (4, 3, 2, 2)
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([0.0, 2.0, 0.0]))
    plain = Normalizer(preprocessing, torch.device("cpu"), channels_last=False)(images)
    assert plain.is_contiguous()
    assert torch.equal(plain, x)


def test_a_channel_without_variance_stays_finite() -> None:
    preprocessing = Preprocessing(
        image_size=1, channel_mean=(0.5, 0.5, 0.5), channel_std=(0.0, 0.0, 0.0)
    )
    images = torch.full((1, 1, 1, 3), 128, dtype=torch.uint8)
    assert Normalizer(preprocessing, torch.device("cpu"))(images).abs().max() < 1


def test_preprocessing_survives_json() -> None:
    preprocessing = Preprocessing(
        image_size=32, channel_mean=(0.1, 0.2, 0.3), channel_std=(0.4, 0.5, 0.6)
    )
    assert Preprocessing.model_validate_json(preprocessing.model_dump_json()) == preprocessing
