"""Images that need no files: photographs of a kind, and a decompression bomb's header."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def photograph(kind: str = "JPEG", size: tuple[int, int] = (375, 500), seed: int = 0) -> bytes:
    """An encoded image of waves and noise, [height, width]."""
    y, x = np.mgrid[: size[0], : size[1]]
    draw = np.random.default_rng(seed)
    waves = [127 + 90 * np.sin(x / (9 + c + seed % 7) + y / 31) for c in range(3)]
    pixels = np.stack(waves, axis=-1) + draw.normal(0, 8, (*size, 3))
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, kind)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises so many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")
