"""From a file's bytes to a square of pixels: the same for packing, training and prediction.

    bytes --decode_image--> RGB picture --to_square--> uint8 [S, S, 3]

What makes of squares what a network sees is `shared.vision.preprocessing`. Knows nothing of
datasets or networks, and loads no torch.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image
from PIL.Image import Resampling, Transpose

from shared.errors import BadImage, ImageTooLarge

# Pillow warns of odd metadata, which does not concern the pixels, and of large pictures, which
# `decode_image` decides itself. Set once: a filter around each call would not be safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
Image.MAX_IMAGE_PIXELS = None

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")
"""Formats that are decoded; no other decoder ever sees a client's bytes."""

_TO_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""What undoes each value of EXIF's Orientation; 1 is upright."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """An upright RGB picture, and what its file was before: the `format`, one of `IMAGE_FORMATS`;
    the `mode`, Pillow's word for how pixels are stored; whether it is one of several frames, was
    turned, has transparent pixels."""

    picture: Image.Image
    format: str
    mode: str
    is_animated: bool
    is_rotated: bool
    is_transparent: bool


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """The picture that `decode` gives."""
    return decode(data, max_pixels).picture


def decode(data: bytes, max_pixels: int) -> Decoded:
    """Decodes a file into an upright RGB picture.

    The EXIF orientation is applied; transparent pixels are laid over white; 16-bit grey is scaled
    to 8 bits; CMYK and palettes are converted; of an animation the first frame is taken.

    Raises:
        BadImage: no image of `IMAGE_FORMATS`, or one that does not decode to its end.
        ImageTooLarge: more than `max_pixels` by its header; nothing was decoded.
    """
    if not data:
        raise BadImage("The file is empty")
    picture = _open(data, max_pixels)
    try:
        picture.load()
        upright = _turn_upright(picture)
        return Decoded(
            picture=_to_rgb(upright),
            format="JPEG" if picture.format == "MPO" else picture.format or "",
            mode=picture.mode,
            is_animated=getattr(picture, "is_animated", False),
            is_rotated=upright is not picture,
            is_transparent=upright.has_transparency_data,
        )
    except BadImage:
        raise
    except Exception as error:  # damaged bytes make decoders raise nearly anything
        raise BadImage(f"The {picture.format} image is damaged or truncated") from error


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Reads the header only."""
    try:
        picture = Image.open(BytesIO(data), formats=IMAGE_FORMATS)
    except Exception as error:
        raise BadImage(f"Not an image that can be read: {', '.join(IMAGE_FORMATS)}") from error
    width, height = picture.size
    if width * height > max_pixels:
        raise ImageTooLarge(f"{width} x {height} is more than {max_pixels:,} pixels")
    if width * height == 0:
        raise BadImage("The image has no pixels")
    return picture


def _turn_upright(picture: Image.Image) -> Image.Image:
    transpose = _TO_UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    return picture if transpose is None else picture.transpose(transpose)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise BadImage("Pixels are floating-point numbers of unknown range")
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion cuts off at 255
        levels = np.asarray(picture, dtype=np.int64).clip(0, 65_535)
        picture = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def to_square(picture: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """The largest centred square of an RGB picture at `size` pixels: uint8 [size, size, 3].

    Resized bilinearly, with antialiasing when it shrinks: one resampling, which equals resizing
    the shorter side to `size` and cropping the centre.
    """
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.array(picture.resize((size, size), Resampling.BILINEAR, box=box), dtype=np.uint8)
