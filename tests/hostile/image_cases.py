"""Image files that users have, and what becomes of each: pixels, or a refusal."""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
from PIL import Image

from tests.hostile.files import (
    NO_FILES,
    Write,
    bmp,
    content,
    encoded,
    gif,
    jpeg,
    npy_header,
    png,
    png_rows,
    saved,
    tiff,
    turned,
    webp,
)


@dataclasses.dataclass(frozen=True)
class ImageCase:
    """A file, and its pixels as read (`within` so much) or words of the message that refuses it."""

    name: str
    write: Write
    pixels: np.ndarray | None = None
    within: int = 0
    remark: str = ""
    refused: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        return f"{self.name.replace(' ', '_')}.png"


GREY = np.arange(0, 256, 2, np.uint8)[: 8 * 12].reshape(8, 12)
RGB = np.stack([GREY, GREY.T.reshape(8, 12)[::-1], 255 - GREY], axis=-1)
FLAT = np.repeat(np.repeat([[[200, 30, 40], [20, 180, 60]]], 8, axis=0), 6, axis=1).astype(np.uint8)
ALPHA = np.repeat([[0, 255, 255]], 4, axis=1).repeat(8, axis=0).astype(np.uint8)  # 8 x 12
WHITE_LEFT = np.where(ALPHA[..., None] == 0, 255, RGB).astype(np.uint8)
GREY_RGB = np.repeat(GREY[..., None], 3, axis=-1)
GREY_WHITE_LEFT = np.where(ALPHA[..., None] == 0, 255, GREY_RGB).astype(np.uint8)
TRANSPARENT, FRAMES = "transparent pixels", "several frames"

rgb, grey, flat = Image.fromarray(RGB), Image.fromarray(GREY), Image.fromarray(FLAT)
wide = Image.fromarray(GREY.astype(np.uint16) * 257)  # 16 bits
rgba = Image.fromarray(np.concatenate([RGB, ALPHA[..., None]], axis=-1))
la = Image.fromarray(np.stack([GREY, ALPHA], axis=-1))
palette = rgb.quantize(256)


def kept(name: str, write: Write, pixels: np.ndarray = RGB, within: int = 0, remark: str = ""):
    return ImageCase(name, write, pixels, within, remark)


def refused(name: str, write: Write, *words: str):
    return ImageCase(name, write, refused=words)


def oriented(number: int) -> np.ndarray:
    """`RGB` as a viewer turns it (EXIF 2.32, table 6)."""
    turn = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a[::-1].swapaxes(0, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: a[:, ::-1].swapaxes(0, 1),
    }
    return turn.get(number, lambda a: a)(RGB)


def plain(colour: tuple[int, int, int], width: int = 8, height: int = 8) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def pair(image: Image.Image, kind: str, **options):
    """A file of two frames, of which the second is black."""
    black = Image.new(image.mode, image.size)
    return saved(image, kind, save_all=True, append_images=[black], **options)


PLAIN = [
    *(kept(f"rgb {kind}", saved(rgb, kind)) for kind in ("PNG", "TIFF", "BMP", "PPM", "TGA")),
    kept("rgb webp", saved(rgb, "WEBP", lossless=True)),
    kept("rgb jpeg2000", saved(rgb, "JPEG2000")),
    kept("rgb avif", saved(flat, "AVIF", quality=100, subsampling="4:4:4"), FLAT, 12),
    kept("rgb tiff deflate", saved(rgb, "TIFF", compression="tiff_adobe_deflate")),
    kept("rgb tiff lzw", saved(rgb, "TIFF", compression="tiff_lzw")),
    kept("jpeg", saved(flat, "JPEG", quality=95, subsampling=0), FLAT, 12),
    kept("jpeg progressive", saved(flat, "JPEG", quality=95, progressive=True), FLAT, 60),
    kept("grey jpeg", saved(grey, "JPEG", quality=100), GREY_RGB, 12),
    *(kept(f"grey {kind}", saved(grey, kind), GREY_RGB) for kind in ("PNG", "TIFF", "GIF", "PPM")),
    kept("one bit", saved(grey.point(lambda v: v > 99, "1")), np.where(GREY_RGB > 99, 255, 0)),
    kept("palette png", saved(palette)),
    kept("palette gif", saved(palette, "GIF")),
    kept("two bits", content(png(4, 1, 2, 0, b"\0\x1b")), np.array([[[0], [85], [170], [255]]])),
    kept("four bits", content(png(2, 1, 4, 0, b"\0\x0f")), np.array([[[0], [255]]])),
    kept("one pixel", saved(Image.new("RGB", (1, 1), (7, 8, 9))), np.array([[[7, 8, 9]]])),
    kept("aspect 1 to 20", saved(Image.new("RGB", (2, 40))), plain((0, 0, 0), 2, 40)),
    kept("aspect 20 to 1", saved(Image.new("RGB", (40, 2))), plain((0, 0, 0), 40, 2)),
    kept("bogus profile", saved(rgb, icc_profile=b"none")),
    kept("comment", content(png(12, 8, 8, 2, png_rows(RGB), (b"tEXt", b"Comment\0" + b"x" * 999)))),
    kept("png without its end", content(encoded(rgb, "PNG")[:-12])),
    kept("rubbish after the end", content(encoded(rgb, "PNG") + b"rubbish")),
]

DEPTHS = [
    kept("16 bits png", saved(wide), GREY_RGB),
    kept("16 bits tiff", saved(wide, "TIFF"), GREY_RGB),
    kept("16 bits tiff big endian", saved(wide.convert("I").convert("I;16B"), "TIFF"), GREY_RGB),
    kept("16 bits pgm", saved(wide, "PPM"), GREY_RGB),
    kept("16 bits jpeg2000", saved(wide, "JPEG2000"), GREY_RGB),
    kept("16 bits lzw", saved(wide, "TIFF", compression="tiff_lzw"), GREY_RGB),
    kept(
        "16 bits rounded",
        saved(Image.fromarray(np.array([[0, 128, 129, 32767, 65406, 65407]], np.uint16))),
        np.array([[[0], [0], [1], [127], [254], [255]]]),
    ),
    kept(
        "16 bits dark", saved(Image.fromarray(np.full((4, 4), 99, np.uint16))), np.zeros((4, 4, 3))
    ),
    kept("16 bits colour", content(png(12, 8, 16, 2, png_rows(RGB.astype(np.uint16) * 257)))),
    kept(
        "16 bits grey and alpha",
        content(png(12, 8, 16, 4, png_rows(np.stack([GREY, ALPHA], -1).astype(np.uint16) * 257))),
        GREY_WHITE_LEFT,
        remark=TRANSPARENT,
    ),
    kept(
        "16 bits colour and alpha",
        content(png(12, 8, 16, 6, png_rows(np.asarray(rgba).astype(np.uint16) * 257))),
        WHITE_LEFT,
        remark=TRANSPARENT,
    ),
    kept("16 bits turned", saved(wide, exif=turned(6)), GREY_RGB[::-1].swapaxes(0, 1)),
    refused(
        "16 bits transparent grey",
        content(png(12, 8, 16, 0, png_rows(GREY.astype(np.uint16)), (b"tRNS", b"\0\2"))),
        "16-bit",
        "8 bits",
    ),
    refused("float tiff", saved(Image.new("F", (8, 8), 0.5), "TIFF"), "floating-point", "8 or 16"),
    refused("32 bits tiff", saved(Image.new("I", (8, 8), 9), "TIFF"), "32-bit", "8 or 16"),
]

COLOURS = [
    kept(
        "cmyk tiff", saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), plain((255, 0, 0))
    ),
    kept(
        "cmyk jpeg",
        saved(Image.new("CMYK", (8, 8), (255, 0, 255, 0)), "JPEG"),
        plain((0, 255, 0)),
        3,
    ),
    kept(
        "cmyk dark", saved(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "TIFF"), np.zeros((8, 8, 3))
    ),
    kept("ycbcr jpeg tiff", saved(flat, "TIFF", compression="jpeg"), FLAT, 60),
    kept(
        "lab tiff",
        saved(Image.new("LAB", (8, 8), (255, 128, 128)), "TIFF"),
        plain((255, 255, 255)),
        3,
    ),
    kept("rgbx tiff", saved(rgb.convert("RGBX"), "TIFF")),
]

TURNED = [
    *(kept(f"turned {n} png", saved(rgb, exif=turned(n)), oriented(n)) for n in range(10)),
    *(
        kept(f"turned {n} webp", saved(rgb, "WEBP", lossless=True, exif=turned(n)), oriented(n))
        for n in (3, 6)
    ),
    *(kept(f"turned {n} tiff", saved(rgb, "TIFF", exif=turned(n)), oriented(n)) for n in (2, 8)),
    kept(
        "turned jpeg",
        saved(flat, "JPEG", quality=95, subsampling=0, exif=turned(6)),
        FLAT[::-1].swapaxes(0, 1),
        12,
    ),
    kept(
        "turned mirrored jpeg",
        saved(flat, "JPEG", quality=95, subsampling=0, exif=turned(2)),
        FLAT[:, ::-1],
        12,
    ),
    kept(
        "turned and transparent",
        saved(rgba, exif=turned(3)),
        WHITE_LEFT[::-1, ::-1],
        remark=TRANSPARENT,
    ),
    kept("turned palette", saved(palette, exif=turned(8)), oriented(8)),
    kept("turned narrow", saved(Image.new("RGB", (2, 40)), exif=turned(6)), np.zeros((2, 40, 3))),
    refused("broken exif", saved(rgb, exif=b"Exif\0\0rubbish"), "cannot be read", "replace"),
]


def indexed(alpha: bytes | int) -> Write:
    """A palette image whose left third has colour 0, which is red and transparent."""
    numbers = np.where(ALPHA == 0, 0, 1).astype(np.uint8)
    image = Image.fromarray(numbers).convert("P")
    image.putpalette([255, 0, 0, 10, 20, 30])
    return saved(image, transparency=alpha)


SEEN = plain((10, 20, 30), 12)
SEEN[:, :4] = 255
KEYED = np.where(ALPHA[..., None] == 0, (1, 2, 3), RGB).astype(np.uint8)  # colour 1, 2, 3 is clear
KEYED_GREY = np.where(ALPHA == 0, 1, GREY).astype(np.uint8)  # GREY is even
HALF = np.concatenate([np.zeros((8, 12, 3)), np.full((8, 12, 1), 128)], axis=-1).astype(np.uint8)

CLEAR = [
    kept("rgba png", saved(rgba), WHITE_LEFT, remark=TRANSPARENT),
    kept("rgba tiff", saved(rgba, "TIFF"), WHITE_LEFT, remark=TRANSPARENT),
    kept(
        "rgba webp", saved(rgba, "WEBP", lossless=True, exact=True), WHITE_LEFT, remark=TRANSPARENT
    ),
    kept("la png", saved(la), GREY_WHITE_LEFT, remark=TRANSPARENT),
    kept("la tiff", saved(la, "TIFF"), GREY_WHITE_LEFT, remark=TRANSPARENT),
    kept("pa tiff", saved(rgba.convert("PA"), "TIFF"), np.full((8, 12, 3), 255), 255, TRANSPARENT),
    kept("palette with one clear colour", indexed(0), SEEN, remark=TRANSPARENT),
    kept("palette with alpha", indexed(b"\x00\xff"), SEEN, remark=TRANSPARENT),
    kept(
        "palette with opaque alpha", indexed(b"\xff\xff"), np.where(SEEN == 255, (255, 0, 0), SEEN)
    ),
    kept(
        "rgb with a clear colour",
        saved(Image.fromarray(KEYED), transparency=(1, 2, 3)),
        WHITE_LEFT,
        remark=TRANSPARENT,
    ),
    kept(
        "grey with a clear value",
        saved(Image.fromarray(KEYED_GREY), transparency=1),
        GREY_WHITE_LEFT,
        remark=TRANSPARENT,
    ),
    kept(
        "gif with a clear colour",
        saved(Image.fromarray(KEYED_GREY), "GIF", transparency=1),
        GREY_WHITE_LEFT,
        remark=TRANSPARENT,
    ),
    kept("half clear", saved(Image.fromarray(HALF)), plain((127, 127, 127), 12), 1, TRANSPARENT),
    kept(
        "all clear",
        saved(Image.new("RGBA", (8, 8), (9, 9, 9, 0))),
        plain((255, 255, 255)),
        remark=TRANSPARENT,
    ),
    kept("opaque rgba", saved(rgb.convert("RGBA"))),
    kept("opaque la", saved(grey.convert("LA")), GREY_RGB),
]

MOVING = [
    kept("animated gif", pair(grey, "GIF"), GREY_RGB, remark=FRAMES),
    kept("animated png", pair(rgb, "PNG"), remark=FRAMES),
    kept("animated webp", pair(rgb, "WEBP", lossless=True), remark=FRAMES),
    kept("pages tiff", pair(rgb, "TIFF"), remark=FRAMES),
    kept("animated avif", pair(flat, "AVIF", quality=100, subsampling="4:4:4"), FLAT, 12, FRAMES),
    kept("camera mpo", pair(flat, "MPO", quality=95, subsampling=0), FLAT, 12),
    kept("one frame gif", saved(grey, "GIF", save_all=True), GREY_RGB),
    kept("animated and transparent", pair(rgba, "PNG"), WHITE_LEFT, remark=FRAMES),
]

NO_FILE = [refused(name, write, word) for name, (write, word) in NO_FILES.items()]

PNG, JPEG = encoded(rgb, "PNG"), encoded(flat, "JPEG")
BROKEN = [
    refused("empty", content(b""), "not an image", "replace"),
    refused("zeros", content(bytes(1000)), "not an image", "replace"),
    *(
        refused(f"text {n}", content(text), "not an image", "replace")
        for n, text in enumerate(
            (
                "no image",
                "<!DOCTYPE html><html><body>404</body></html>",
                '<svg xmlns="http://www.w3.org/2000/svg"/>',
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
                "%PDF-1.7\n",
            )
        )
    ),
    refused("zip", content(b"PK\x03\x04" + bytes(60)), "not an image"),
    refused("heic", content(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60)), "replace"),
    refused("video", content(b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(60)), "replace"),
    refused("npy", content(npy_header((4, 4))), "not an image"),
    refused(
        "postscript", content("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"), "replace"
    ),
    *(refused(f"png of {n} bytes", content(PNG[:n]), "replace") for n in (4, 8, 20, 33, 60, 90)),
    *(refused(f"jpeg of {n} bytes", content(JPEG[:n]), "replace") for n in (2, 20, 160, 400)),
    *(
        refused(f"half {kind}", content(data[: len(data) // 2]), "replace")
        for kind, data in (
            ("gif", encoded(grey, "GIF")),
            ("webp", encoded(rgb, "WEBP", lossless=True)),
            ("tiff", encoded(rgb, "TIFF")),
            ("bmp", encoded(rgb, "BMP")),
            ("avif", encoded(flat, "AVIF")),
            ("jpeg2000", encoded(rgb, "JPEG2000")),
            ("ppm", encoded(rgb, "PPM")),
        )
    ),
    refused("png header checksum", content(PNG[:29] + b"\0\0\0\0" + PNG[33:]), "replace"),
    refused("png without pixels", content(png(8, 8, 8, 2, b"")), "replace"),
    refused("png of width 0", content(png(0, 8, 8, 2, b"")), "replace"),
    refused("png of colour 9", content(png(8, 8, 8, 9, b"")), "replace"),
    refused("png without end of rows", content(png(8, 8, 8, 2, bytes(20))), "replace"),
    refused("jpeg2000 of nothing", content(b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40)), "replace"),
    refused("webp of nothing", content(b"RIFF\x20\0\0\0WEBPVP8L" + bytes(24)), "replace"),
    refused("tiff of nothing", content(b"II*\0\x08\0\0\0\0\0\0\0\0\0"), "replace"),
    refused("tiff in a circle", content(b"II*\0\x08\0\0\0\0\0\x08\0\0\0"), "replace"),
    refused("ppm of letters", content("P6\nx y\n255\n"), "replace"),
]

NARROW = [
    refused(f"{w} x {h}", saved(Image.new("1", (w, h))), "aspect ratio", "1:20", "crop")
    for w, h in ((1, 60000), (60000, 1), (1, 21), (21, 1), (10, 201), (3, 61))
]

DEFLATED = zlib.compress(bytes(80_000_000), 9)
BOMBS = [
    *(
        refused(
            f"bomb png {w} x {h}", content(png(w, h, 8, 2, bytes(99))), "over 67108864", "scale"
        )
        for w, h in ((8193, 8192), (12000, 12000), (30000, 30000), (2**31 - 1, 2**31 - 1))
    ),
    refused("bomb jpeg", content(jpeg(65500, 65500)), "over 67108864", "scale"),
    refused("bomb jpeg of 100 million", content(jpeg(10000, 10000)), "over 67108864", "scale"),
    refused("bomb gif", content(gif(65535, 65535)), "over 67108864", "scale"),
    refused("bomb bmp", content(bmp(50000, 50000)), "over 67108864", "scale"),
    refused("bomb tiff", content(tiff(60000, 60000)), "over 67108864", "scale"),
    refused("bomb webp", content(webp(16383, 16383)), "over 67108864", "scale"),
    refused("bomb ppm", content(b"P6\n100000 100000\n255\n" + bytes(99)), "over 67108864", "scale"),
    refused("claims 8192 x 8192", content(png(8192, 8192, 8, 6, bytes(99))), "replace"),
    refused(
        "text bomb",
        content(png(12, 8, 8, 2, png_rows(RGB), (b"zTXt", b"a\0\0" + DEFLATED))),
        "replace",
    ),
    refused(
        "profile bomb",
        content(png(12, 8, 8, 2, png_rows(RGB), (b"iCCP", b"a\0\0" + DEFLATED))),
        "replace",
    ),
]

CASES = [
    case
    for of_kind in (
        PLAIN,
        DEPTHS,
        COLOURS,
        TURNED,
        CLEAR,
        MOVING,
        NO_FILE,
        BROKEN,
        NARROW,
        BOMBS,
    )
    for case in of_kind
]
assert len({case.file for case in CASES}) == len(CASES)
