"""PNG files of depths and transparent colours that Pillow does not write."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np


def write_png(
    path: Path, bits: int, colour_type: int, values: np.ndarray, key: tuple[int, ...] = ()
) -> None:
    """Write values `[h, w]` or `[h, w, channels]` of 1 to 16 bits, one colour transparent."""
    height, width = values.shape[:2]
    lines = values.reshape(height, -1).astype(">u2" if bits == 16 else np.uint8)
    if bits < 8:
        binary = np.unpackbits(lines[..., None], axis=-1)[..., 8 - bits :]  # [h, w, bits]
        lines = np.packbits(binary.reshape(height, -1), axis=-1)

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
        + (chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b"")
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines)))
        + chunk(b"IEND", b"")
    )
