"""Generated frames and latents as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from contextualstory_jax.utils.atomic import atomic_path
from contextualstory_jax.utils.errors import UserError, require
from contextualstory_jax.utils.files import check_file


def save_frames(
    folder: Path,
    images: UInt8[np.ndarray, "f h w 3"],
    sentences: Sequence[str],
    seeds: Sequence[int | None],
    name: str = "frame",
) -> None:
    """Write `NAME_0.png` and so on into a folder; they hold sentence and, if there is one, seed."""
    for i, image in enumerate(images):
        Image.fromarray(image).save(
            folder / f"{name}_{i}.png", pnginfo=png_text(seeds[i : i + 1], sentences[i])
        )


def png_text(seeds: Sequence[int | None], sentence: str) -> PngInfo:
    """Seeds and sentences as the text that a PNG file holds; several seeds are listed."""
    info = PngInfo()
    known = dict.fromkeys(str(seed) for seed in seeds if seed is not None)
    if known:
        info.add_text("seed", ", ".join(known))
    info.add_text("sentence", sentence)
    return info


def write_latents(path: Path, latents: Float32[np.ndarray, "b f p q c"]) -> None:
    """Write a `.npy` file. Raises `UserError` where it cannot be written."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, latents)


def read_latents(path: Path) -> np.ndarray:
    """The array of a `.npy` file. Raises `UserError` where it is missing or none."""
    check_file(path, "name another")
    try:
        latents = np.load(path, allow_pickle=False)
    except Exception as error:  # almost anything, for files that are broken
        raise UserError(f"{path} cannot be read as a .npy file of numbers; name another") from error
    require(isinstance(latents, np.ndarray), f"{path} holds several arrays; name a .npy file")
    require(latents.dtype.kind in "fiu", f"{path} holds {latents.dtype}, not numbers; name another")
    return latents
