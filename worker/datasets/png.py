"""Writes pixels as PNG files that are the same on every machine."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt


def png_bytes(pixels: npt.NDArray[Any]) -> bytes:
    """The PNG of uint8 [H, W] or [H, W, 3] of up to 64 KiB, stored without compression.

    Compressors differ from one zlib to the next; stored bytes, and with them the hash of a
    built-in dataset, are the same everywhere.
    """
    height, width = pixels.shape[:2]
    colour_type = 2 if pixels.ndim == 3 else 0
    rows = pixels.reshape(height, -1)
    raw = np.pad(rows, ((0, 0), (1, 0))).tobytes()  # before each row, filter 0: none
    stored = struct.pack("<BHH", 1, len(raw), len(raw) ^ 0xFFFF) + raw
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    body = b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(raw))
    chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
