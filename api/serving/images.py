"""From uploaded bytes to what a network sees, by the training's own rules.

Runs in a few threads of its own, ahead of the model's queue: an image that is none is refused
before anything is loaded, and only small squares wait in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt

from shared.errors import AppError, BadImage, ImageTooLarge
from shared.images import decode_image, to_square

NUM_THREADS = 2
"""Each may hold a decoded picture of `max_image_pixels`, 3 bytes a pixel."""

T = TypeVar("T")
Square = npt.NDArray[np.uint8]


class Decoder:
    """Decodes images with a limit on how many are in memory at full size."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._threads = ThreadPoolExecutor(NUM_THREADS, "decode")

    async def decode(
        self, files: list[BinaryIO], find: Callable[[], T], size_of: Callable[[T], int]
    ) -> tuple[T, Square]:
        """What `find` finds, which may take its time, and uint8 [B, S, S, 3] of `files` at the size
        S that it has. One image takes a single trip to a thread for both.

        Raises:
            BadImage, ImageTooLarge: `errors` names each image that was refused, as `image[2]`.
            Exception: what `find` raises.
        """
        loop = asyncio.get_running_loop()

        def begin() -> tuple[T, Square | AppError]:
            found = find()
            return found, self._try(files[0], size_of(found))

        found, first = await loop.run_in_executor(self._threads, begin)
        size = size_of(found)
        rest = (loop.run_in_executor(self._threads, self._try, file, size) for file in files[1:])
        results = [first, *await asyncio.gather(*rest)]
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
        return found, np.stack([result for result in results if isinstance(result, np.ndarray)])

    def _try(self, file: BinaryIO, size: int) -> Square | AppError:
        try:
            return to_square(decode_image(file.read(), self._max_pixels), size)
        except (BadImage, ImageTooLarge) as error:
            return error

    def close(self) -> None:
        """Lets go of the threads; images that wait are not decoded any more."""
        self._threads.shutdown(cancel_futures=True)
