from __future__ import annotations

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from shared.errors import BadImage, ImageTooLarge
from shared.images import decode_image, to_square

MAX_PIXELS = 64_000_000


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    image = decode_image(data, MAX_PIXELS)
    assert image.mode == "RGB"
    return np.asarray(image)


def picture(height: int = 6, width: int = 9) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def bomb_png(width: int, height: int) -> bytes:
    """A whole PNG of black pixels whose file is a thousandth of what it unpacks to."""

    def chunk(name: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 1) * height), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_decode_to_the_same_pixels(format: str) -> None:
    np.testing.assert_array_equal(decode(encode(picture(), format)), np.asarray(picture()))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_decode_to_the_size(format: str) -> None:
    assert decode(encode(picture(), format)).shape == (6, 9, 3)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello, this is text\n" * 100,
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="6"/>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 6\n",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
    ],
    ids=["empty", "text", "svg", "eps", "jpeg marker", "png magic", "gif magic"],
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(BadImage):
        decode_image(data, MAX_PIXELS)


@pytest.mark.parametrize("format", ["PPM", "ICO", "TGA", "PCX"])
def test_formats_off_the_list_are_refused(format: str) -> None:
    with pytest.raises(BadImage, match="Not an image"):
        decode_image(encode(picture(16, 16), format), MAX_PIXELS)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_image_is_refused(format: str, share: float) -> None:
    data = encode(picture(64, 64), format)
    with pytest.raises(BadImage):
        decode_image(data[: int(len(data) * share)], MAX_PIXELS)


def test_a_bomb_is_refused_by_its_header() -> None:
    data = bomb_png(12_000, 12_000)
    assert len(data) < 100_000
    with pytest.raises(ImageTooLarge):
        decode_image(data, MAX_PIXELS)


def test_a_bomb_of_nearly_a_gigapixel_is_too_large_as_well() -> None:
    with pytest.raises(ImageTooLarge):
        decode_image(bomb_png(30_000, 30_000), MAX_PIXELS)


def test_a_picture_of_exactly_the_limit_is_decoded() -> None:
    data = encode(picture(6, 9))
    assert decode_image(data, 54).size == (9, 6)
    with pytest.raises(ImageTooLarge):
        decode_image(data, 53)


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    for name in ("GIF", "WEBP"):
        data = encode(frames[0], name, save_all=True, append_images=frames[1:], lossless=True)
        assert decode(data)[0, 0].tolist() == [255, 0, 0]


def test_cmyk_becomes_rgb() -> None:
    data = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    np.testing.assert_allclose(decode(data)[0, 0], [255, 0, 0], atol=3)


def test_transparent_pixels_of_a_palette_are_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    assert decode(encode(image, transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert decode(encode(image, transparency=b"\xff\x00")).tolist() == [
        [[255, 0, 0], [255, 255, 255]]
    ]


def test_alpha_is_laid_over_white() -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(0, 0, 0, 255), (0, 0, 0, 51), (10, 20, 30, 0)])
    assert decode(encode(image)).tolist() == [[[0] * 3, [204] * 3, [255] * 3]]


def test_grey_with_alpha_is_laid_over_white() -> None:
    image = Image.new("LA", (2, 1))
    image.putdata([(7, 255), (7, 0)])
    assert decode(encode(image)).tolist() == [[[7] * 3, [255] * 3]]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_to_8_bits(format: str) -> None:
    levels = np.array([[0, 128, 129, 257, 32_768, 65_535]], dtype=np.uint16)
    pixels = decode(encode(Image.fromarray(levels), format))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    assert (pixels == pixels[..., :1]).all()


def test_black_and_white_spans_all_levels() -> None:
    image = Image.fromarray(np.array([[False, True]]))
    assert image.mode == "1"
    assert decode(encode(image)).tolist() == [[[0] * 3, [255] * 3]]


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(BadImage, match="floating-point"):
        decode_image(encode(Image.new("F", (2, 2), 0.5), "TIFF"), MAX_PIXELS)


def test_a_single_pixel_fills_the_square() -> None:
    square = to_square(decode_image(encode(Image.new("RGB", (1, 1), "red")), MAX_PIXELS), 32)
    assert square.shape == (32, 32, 3)
    assert (square == [255, 0, 0]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_a_rotated_photo_equals_its_upright_twin(orientation: int, format: str) -> None:
    upright = np.asarray(picture())
    stored = {  # how a camera held that way stores the upright picture
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    image = Image.fromarray(np.ascontiguousarray(stored))
    np.testing.assert_array_equal(decode(encode(image, format, exif=exif, **options)), upright)


def test_a_rotated_jpeg_equals_its_upright_twin() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = encode(picture(16, 32), "JPEG", exif=exif)
    plain = encode(picture(16, 32), "JPEG")
    np.testing.assert_array_equal(decode(rotated), np.rot90(decode(plain), -1))


def test_odd_metadata_does_not_matter() -> None:
    assert decode(encode(picture(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff")).shape == (6, 9, 3)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(
        decode(encode(picture(), icc_profile=profile)), np.asarray(picture())
    )


def test_decoding_in_threads_gives_what_one_thread_gives() -> None:
    data = encode(picture(64, 64))
    with ThreadPoolExecutor(4) as pool:
        for pixels in pool.map(decode, [data] * 40):
            np.testing.assert_array_equal(pixels, np.asarray(picture(64, 64)))


def test_a_square_of_the_right_size_is_left_alone() -> None:
    image = picture(32, 32)
    square = to_square(image, 32)
    np.testing.assert_array_equal(square, np.asarray(image))
    assert square.dtype == np.uint8
    assert square.flags.writeable


def test_the_square_is_the_centre() -> None:
    pixels = np.zeros((2, 6, 3), dtype=np.uint8)
    pixels[:, 2:4] = 200
    assert (to_square(Image.fromarray(pixels), 2) == 200).all()
    assert (to_square(Image.fromarray(pixels.transpose(1, 0, 2).copy()), 2) == 200).all()


def test_shrinking_averages() -> None:
    checkered = np.indices((64, 64)).sum(axis=0) % 2 * 255
    image = Image.fromarray(checkered.astype(np.uint8)).convert("RGB")
    np.testing.assert_allclose(to_square(image, 8).astype(int), 127.5, atol=8)


def test_a_very_long_picture_costs_no_more_than_its_square() -> None:
    assert to_square(Image.new("RGB", (100_000, 1), "blue"), 32)[5, 5].tolist() == [0, 0, 255]
