"""Story folders: generated frames with all that is needed to change some or to make them again.

::

    FOLDER/frame_0.png ...   the frames; each file holds sentence and seed
    FOLDER/grid.png          all frames side by side, with captions
    FOLDER/story.gif         one after the other
    FOLDER/latents.npy       float32 (frames, h, w, c), before decoding
    FOLDER/first_frame.png   the image that a continuation began from
    FOLDER/story.json        sentences, seed of each frame, checkpoint, settings, versions, and
                             the SHA-256 of each file, by which damage is found
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from contextualstory_jax import __version__
from contextualstory_jax.config.build import build
from contextualstory_jax.config.model_config import FrameInitConfig, SamplingConfig
from contextualstory_jax.data.images import read_image
from contextualstory_jax.sampling.export_formats import FORMATS, strip
from contextualstory_jax.sampling.output import png_text, read_latents, save_frames
from contextualstory_jax.sampling.prompts import Story, check_text, folder_name, read_context
from contextualstory_jax.utils.atomic import atomic_path, finish_replacing, write_json
from contextualstory_jax.utils.errors import UserError, brief, require
from contextualstory_jax.utils.files import check_file, has_file

FORMAT = 1
JSON = "story.json"
OWN_FILES = re.compile(r"frame_\d+\.png|first_frame\.png|latents\.npy|story\.\w+|grid\.png")
FIX = "restore it, or generate the story again"


def versions() -> dict[str, str]:
    """Versions of the libraries that decide a generated image's bytes."""
    others = {name: importlib.metadata.version(name) for name in ("jax", "flax")}
    return {"contextualstory_jax": __version__, **others}


@dataclasses.dataclass(frozen=True)
class SavedStory:
    """A story folder's content."""

    story: Story  # with its first frame, if any, as an array
    images: UInt8[np.ndarray, "f h w 3"]
    latents: Float32[np.ndarray, "f p q c"] | None  # None: the images are encoded where needed
    seeds: tuple[int | None, ...]  # of each frame; None for one's own image
    checkpoint: Mapping[str, Any]  # `path`, `step` and `weights`
    settings: Mapping[str, Any]  # all else that decides the images
    versions: Mapping[str, str] = dataclasses.field(default_factory=versions)

    def write(self, folder: Path, captions: bool = True, formats: Collection[str] = ()) -> None:
        """Write the folder, in place of the story that was there; other files in it stay.

        Args:
            folder: Made where it is not there.
            captions: Whether `grid.png`, `story.gif` and so on show the sentences.
            formats: Names in `FORMATS` (`export_formats.py`) of more files to write.

        Raises:
            UserError: The folder cannot be written, or a format's library is not installed.
        """
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            self._write_files(temporary, captions, formats)
            names = {path.name for path in temporary.iterdir()}
        for path in folder.iterdir():
            if path.name not in names and OWN_FILES.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _write_files(self, folder: Path, captions: bool, formats: Collection[str]) -> None:
        sentences = self.story.sentences
        shown = sentences if captions else None
        save_frames(folder, self.images, sentences, self.seeds)
        text = png_text(self.seeds, "\n".join(sentences))
        (folder / "grid.png").write_bytes(strip(self.images, shown, text))
        for name in {"gif", *formats} - {"strip"}:
            file, export = FORMATS[name]
            (folder / file).write_bytes(export(self.images, shown))
        if self.latents is not None:
            np.save(folder / "latents.npy", self.latents)
        if isinstance(self.story.first_frame, np.ndarray):
            Image.fromarray(self.story.first_frame).save(folder / "first_frame.png")
        values = {
            "format": FORMAT,
            "id": self.story.id,
            "sentences": list(sentences),
            "context": {str(i): words for i, words in self.story.context.items()},
            "seeds": list(self.seeds),
            "checkpoint": dict(self.checkpoint),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "files": {path.name: _digest(path) for path in sorted(folder.iterdir())},
        }
        write_json(folder / JSON, values)

    def options(self) -> dict[str, Any]:
        """Options of `StoryPipeline.draw` with which the story was generated, seeds and size aside.

        Raises:
            UserError: A setting is no such value.
        """
        names = ("negative_prompt", "storyflow", "camera_motion", "window_overlap")
        options = {name: self.settings[name] for name in names if name in self.settings}
        fields = [field.name for field in dataclasses.fields(SamplingConfig)]
        sampling = {name: self.settings[name] for name in fields if name in self.settings}
        if len(sampling) == len(fields):
            options["sampling"] = build(SamplingConfig, sampling, f"{JSON}: ")
        if isinstance(frameinit := self.settings.get("frameinit"), Mapping):
            options["frameinit"] = build(FrameInitConfig, frameinit, f"{JSON}: frameinit.")
        return options

    def regenerated(
        self,
        images: UInt8[np.ndarray, "f h w 3"],
        latents: Float32[np.ndarray, "f p q c"],
        keep: Sequence[bool],
        seed: int,
        options: Mapping[str, Any],
    ) -> SavedStory:
        """The story with new frames, and settings that generate them again.

        Args:
            images: All frames.
            latents: Those of all frames.
            keep: Which frames are those of this story.
            seed: Of the other frames.
            options: Those of `StoryPipeline.draw` that they were generated with.
        """
        settings = dict(self.settings)
        for name, value in options.items():
            if name == "sampling":
                settings |= dataclasses.asdict(value)
            elif name == "frameinit":
                settings[name] = value and dataclasses.asdict(value)
            elif name in ("negative_prompt", "storyflow", "camera_motion", "window_overlap"):
                settings[name] = value if isinstance(value, str | int | None) else list(value)
        settings |= {
            "seed": seed,
            "kept": [i for i, kept in enumerate(keep) if kept],
            "shared_noise_seed": options.get("shared_noise_seed"),
            "batch_size": 1,
            "initial_latents": None,
        }
        seeds = [old if kept else seed for old, kept in zip(self.seeds, keep, strict=True)]
        return dataclasses.replace(
            self,
            images=images,
            latents=latents,
            seeds=tuple(seeds),
            settings=settings,
            versions=versions(),
        )

    @classmethod
    def read(cls, folder: Path) -> SavedStory:
        """Read a story folder, also while it is written again.

        Raises:
            UserError: It is none, is damaged, or is in the format of a newer version.
        """
        while True:
            version, error = _read_version(folder), None
            try:
                saved = cls._parse(folder, version[0])
            except UserError as caught:
                saved, error = None, caught
            if _read_version(folder) != version:
                continue  # another story took its place meanwhile
            if saved is None:
                raise error or AssertionError
            return saved

    @classmethod
    def _parse(cls, folder: Path, text: bytes) -> SavedStory:
        values = _parse_json(text, folder / JSON)
        sentences, seeds, files = values["sentences"], values["seeds"], values["files"]
        frames = [_read_frame(folder / f"frame_{i}.png", files) for i in range(len(sentences))]
        sizes = {f"{frame.shape[0]} x {frame.shape[1]}" for frame in frames}
        require(
            len(sizes) == 1,
            f"{folder} has frames of different sizes, {' and '.join(sorted(sizes))}; {FIX}",
        )
        first = folder / "first_frame.png"
        return cls(
            Story(
                tuple(sentences),
                values["id"],
                _read_frame(first, files) if first.name in files else None,
                read_context(values.get("context", {}), len(sentences), str(folder / JSON)),
            ),
            np.stack(frames),
            _read_latents(folder / "latents.npy", files, len(frames)),
            tuple(seeds),
            values["checkpoint"],
            values["settings"],
            values["versions"],
        )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_version(folder: Path) -> tuple[bytes, int, int]:
    """The bytes of `story.json`, with all pending files in place; inode and time of the file.

    The last two differ where the same story was written again after another one.
    """
    with contextlib.suppress(OSError):  # where the folder is read-only
        finish_replacing(folder)
    check_file(folder / JSON, "name a story folder that `generate` wrote")
    try:
        with (folder / JSON).open("rb") as file:
            status = os.fstat(file.fileno())
            return file.read(), status.st_ino, status.st_mtime_ns
    except OSError as error:
        raise UserError(f"cannot read {folder / JSON}: {error.strerror}; {FIX}") from error


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """The values of `story.json`, each of its type."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON; {FIX}") from error
    require(
        isinstance(values, dict) and isinstance(values.get("format"), int),
        f"{path} describes no story; {FIX}",
    )
    require(
        values["format"] <= FORMAT,
        f"{path} is in format {values['format']}, and this version reads up to {FORMAT}; "
        "update contextualstory_jax",
    )
    types = {"id": str, "sentences": list, "seeds": list, "files": dict}
    types |= dict.fromkeys(("checkpoint", "settings", "versions"), dict)
    for key, kind in types.items():
        require(
            isinstance(values.get(key), kind),
            f"{path}: {key} is {brief(values.get(key))}, not a {kind.__name__}; {FIX}",
        )
    folder_name(values["id"])
    for sentence in values["sentences"]:
        check_text(sentence, f"{path}, sentences")
    require(
        len(values["seeds"]) == len(values["sentences"]) > 0,
        f"{path} has {len(values['sentences'])} sentences and {len(values['seeds'])} seeds; {FIX}",
    )
    for seed in values["seeds"]:
        require(
            seed is None or (type(seed) is int and 0 <= seed < 2**32),
            f"{path}: a seed is {brief(seed)}, not an integer of 32 bits or null; {FIX}",
        )
    return values


def _check_digest(path: Path, files: Mapping[str, Any]) -> None:
    check_file(path, FIX)
    require(
        _digest(path) == files.get(path.name),
        f"{path} is not the file that {JSON} describes; {FIX}",
    )


def _read_frame(path: Path, files: Mapping[str, Any]) -> UInt8[np.ndarray, "h w 3"]:
    _check_digest(path, files)
    return np.asarray(read_image(path))


def _read_latents(
    path: Path, files: Mapping[str, Any], frames: int
) -> Float32[np.ndarray, "f p q c"] | None:
    if path.name not in files or not has_file(path):
        return None
    _check_digest(path, files)
    latents = read_latents(path)
    require(
        latents.dtype == np.float32
        and latents.ndim == 4
        and len(latents) == frames
        and bool(np.isfinite(latents).all()),
        f"{path} holds {latents.dtype} of shape {latents.shape}, not finite float32 latents of "
        f"{frames} frames; delete it, and the frames are encoded",
    )
    return latents
