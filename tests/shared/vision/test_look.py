"""Grad-CAM on a network whose answer is known to come from one place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from shared.vision import predictor as predictor_module
from shared.vision.predictor import Predictor
from shared.vision.preprocessing import Preprocessing
from tests.shared.vision.test_bundle import make_bundle


class Corner(nn.Module):
    """Features: the red and the green of quarters of the image; class 0 for red, 1 for green."""

    def feature_map(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(images[:, :2], images.shape[-1] // 2).relu()

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        return features.sum(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classify(self.feature_map(images))


@pytest.fixture
def corner(monkeypatch: pytest.MonkeyPatch) -> Predictor:
    plain = Preprocessing(image_size=8, channel_mean=(0, 0, 0), channel_std=(1, 1, 1))
    bundle = make_bundle().model_copy(update={"preprocessing": plain})
    monkeypatch.setattr(predictor_module, "restore_model", lambda *_: Corner())
    return Predictor(bundle, {})


def test_the_answer_comes_from_where_its_features_are(corner: Predictor) -> None:
    side = corner.bundle.preprocessing.image_size
    images = np.zeros((2, side, side, 3), np.uint8)
    images[0, : side // 2, : side // 2, 0] = 255  # red, above on the left
    images[0, side // 2 :, side // 2 :, 1] = 200  # less green, below on the right
    images[1, side // 2 :, :, 1] = 255
    look = corner.look(images)
    assert look.heat.shape == (2, side, side)
    assert look.heat[0, 0, 0] == pytest.approx(1)
    assert look.heat[0, -1, -1] == pytest.approx(0)
    assert look.heat[1, -1].tolist() == pytest.approx([1] * side)
    assert look.heat[1, 0].tolist() == pytest.approx([0] * side)
    np.testing.assert_allclose(
        look.features, [[0.25, 200 / 255 / 4], [0.0, 0.5]], rtol=1e-5, atol=1e-6
    )


def test_where_nothing_speaks_for_an_answer_there_is_no_heat(corner: Predictor) -> None:
    side = corner.bundle.preprocessing.image_size
    look = corner.look(np.zeros((1, side, side, 3), np.uint8))
    assert (look.heat == 0).all()
