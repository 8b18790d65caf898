"""Writes unusual, damaged and hostile files."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Write = Callable[[Path], object]

ORIENTATION = 0x0112  # EXIF's tag


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image as a file of a kind that Pillow writes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> Write:
    return lambda path: path.write_bytes(encoded(image, kind, **options))


def content(data: bytes | str) -> Write:
    return lambda path: path.write_bytes(data.encode() if isinstance(data, str) else data)


def turned(orientation: int) -> Image.Exif:
    """EXIF data with an orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def png(
    width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]
) -> bytes:
    """A PNG file; `rows` are its pixels, each row after a zero byte; `chunks` precede them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    every = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in every)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_rows(pixels: np.ndarray) -> bytes:
    """The rows of a PNG, of pixels (h, w, ...) of 8 or 16 bits."""
    big = pixels.astype(pixels.dtype.newbyteorder(">"))
    return b"".join(b"\0" + row.tobytes() for row in big)


def tiff(width: int, height: int) -> bytes:
    """The header of a grey TIFF of a size, and no pixels."""
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1)]
    tags += [(278, height), (279, width * height % 2**32)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


def jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header claims a size."""
    data = encoded(Image.new("RGB", (8, 8)), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def gif(width: int, height: int) -> bytes:
    """A GIF whose screen and frame claim a size."""
    data = encoded(Image.new("L", (8, 8)), "GIF")
    size = struct.pack("<HH", width, height)
    at = data.index(b"\x2c") + 5
    return data[:6] + size + data[10:at] + size + data[at + 4 :]


def webp(width: int, height: int) -> bytes:
    """A lossless WebP whose header claims a size, up to 16384 x 16384."""
    data = encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True)
    at = data.index(b"VP8L") + 9
    bits = struct.unpack("<I", data[at : at + 4])[0] & ~(2**28 - 1)
    return data[:at] + struct.pack("<I", bits | (height - 1) << 14 | width - 1) + data[at + 4 :]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    """A socket, bound through a short name: those of sockets have 100 bytes at most."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


def link(target: str) -> Write:
    return lambda path: path.symlink_to(target)


# The ways in which a path leads to no file: how to write them, and what a message says.
NO_FILES: dict[str, tuple[Write, str]] = {
    "fifo": (fifo, "FIFO"),
    "socket": (unix_socket, "socket"),
    "device": (link("/dev/zero"), "device"),
    "folder": (lambda path: path.mkdir(), "folder"),
    "missing": (lambda path: None, "No such file"),
    "dangling link": (link("nowhere"), ""),
    "link to itself": (lambda path: path.symlink_to(path.name), ""),
}


def replaced(path: Path, write: Write) -> Path:
    """A path at which something else is written."""
    path.unlink(missing_ok=True)
    write(path)
    return path


def npy_header(shape: object, descr: str = "|u1") -> bytes:
    """A `.npy` file of a stated shape and 16 bytes."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(16)
