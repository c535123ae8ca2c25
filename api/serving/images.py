"""From uploaded bytes to what a network sees, by the training's own rules.

Runs in a few threads of its own, ahead of the model's queue: an image that is none is refused
before anything is loaded, and only small squares wait in memory.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from shared.errors import AppError, BadImage, ImageTooLarge
from shared.images import decode_image, to_square

NUM_THREADS = 2
"""Each may hold a decoded picture of `max_image_pixels`, 3 bytes a pixel."""

Square = npt.NDArray[np.uint8]


class Decoder:
    """Decodes images with a limit on how many are in memory at full size."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._threads = ThreadPoolExecutor(NUM_THREADS, "decode")

    async def decode(self, files: list[BinaryIO], size: int) -> Square:
        """uint8 [B, size, size, 3] of `files`.

        Raises:
            BadImage, ImageTooLarge: `errors` names each image that was refused, as `image[2]`.
        """
        loop = asyncio.get_running_loop()
        results = await asyncio.gather(
            *(loop.run_in_executor(self._threads, self._try, file, size) for file in files)
        )
        errors = {
            place: result for place, result in enumerate(results) if isinstance(result, AppError)
        }
        if errors:
            first = next(iter(errors.values()))
            raise type(first)(
                first.detail,
                errors=[
                    {"loc": f"image[{place}]", "message": error.detail}
                    for place, error in errors.items()
                ],
            )
        return np.stack([result for result in results if isinstance(result, np.ndarray)])

    def _try(self, file: BinaryIO, size: int) -> Square | AppError:
        try:
            return to_square(decode_image(file.read(), self._max_pixels), size)
        except (BadImage, ImageTooLarge) as error:
            return error

    def close(self) -> None:
        """Lets go of the threads; images that wait are not decoded any more."""
        self._threads.shutdown(cancel_futures=True)
