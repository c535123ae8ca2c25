"""Where in an image an answer comes from, as a picture. Pixels only; nothing of networks."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.Image import Resampling

MIN_SIDE = 224
"""Pixels of the picture's side, at least: small images are made larger."""
STOPS = np.array([0.0, 0.35, 0.65, 1.0])
COLOURS = np.array([(30, 60, 160), (40, 170, 160), (250, 210, 60), (220, 50, 40)], np.float64)
"""From where nothing speaks for the answer to where most does: blue, green, yellow, red."""
STRENGTH = 0.55
"""How much of the colour covers the image where most speaks for the answer."""


def overlay(image: npt.NDArray[np.uint8], heat: npt.NDArray[np.float32]) -> Image.Image:
    """The image, uint8 [S, S, 3], under the colours of `heat`, float32 [S, S] in [0, 1]."""
    channels = [np.interp(heat, STOPS, COLOURS[:, channel]) for channel in range(3)]
    cover = STRENGTH * (0.3 + 0.7 * heat)[..., None]
    mixed = image * (1 - cover) + np.stack(channels, axis=-1) * cover
    picture = Image.fromarray(np.round(mixed).astype(np.uint8))
    times = -(-MIN_SIDE // len(image))
    side = times * len(image)
    return picture if times == 1 else picture.resize((side, side), Resampling.BICUBIC)


def encoded(picture: Image.Image) -> str:
    """A PNG in Base64, as JSON can carry it."""
    file = BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
