"""A folder of generated stories beside their originals, in which work can stop and resume.

::

    OUT/settings.json                settings that decide the frames
    OUT/stories/00012-STORY/         one a story, its number in the split first:
        frame_0.png ... frame_4.png            as generated
        original_0.png ... original_4.png
        figure.png                             sentences over originals and generated frames
        text.txt                               a sentence a line
        story.json                             a record a frame, and the size of every file
    OUT/frames.jsonl                 the records of all stories
    OUT/index.html, page_2.html ...  to look at

A story's folder is written atomically, and no two stories share one.

Source: reference `eval.py` save_generated_images and plot_generated_images. There stories overwrite
each other's frames, which are named by ids that overlapping stories share.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from contextualstory_jax.config.build import as_json, dotted
from contextualstory_jax.data.example import FRAMES, Example
from contextualstory_jax.sampling.output import save_frames
from contextualstory_jax.utils.atomic import atomic_path, write_json
from contextualstory_jax.utils.errors import require

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# What may differ between two starts in one folder, because the frames do not depend on it.
FREE = ("checkpoint", "stories", "metrics", "data.root", "data.workers", "data.latents")

SIDE = 128  # pixels of a frame in a figure
TEXT_HEIGHT = 200  # pixels, or more where sentences are long
FONT_SIZE, MARGIN = 12, 5


class SplitStory(NamedTuple):
    """A story without its images: its number in the split, and `source_ids` of its frames."""

    number: int
    id: str
    sentences: tuple[str, ...]
    source_ids: tuple[str, ...]


class Gallery:
    """The stories in a folder; `settings`, as JSON values, decide their frames."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder, self.settings = folder, settings

    def check(self) -> None:
        """Raise `UserError` where the folder holds stories of other settings."""
        path = self.folder / "settings.json"
        if not path.exists():
            return
        theirs, ours = dotted(_read(path)), dotted(as_json(self.settings))
        for key in [key for key in (ours | theirs) if key not in FREE]:
            require(
                theirs.get(key) == ours.get(key),
                f"{self.folder} holds stories generated with {key} = {theirs.get(key)!r}, not "
                f"{ours.get(key)!r}; choose another --out or that value",
            )

    def write_settings(self) -> None:
        """Write them, which is to be done before the first story."""
        write_json(self.folder / "settings.json", self.settings)

    def place(self, story: SplitStory) -> Path:
        """The folder of a story."""
        return self.folder / "stories" / f"{story.number:05d}-{story.id}"

    def has(self, story: SplitStory) -> bool:
        """Whether a story is there, generated from these sentences, with all of its files."""
        folder = self.place(story)
        written = _read(folder / "story.json")
        sentences = tuple(record["sentence"] for record in written.get("frames", ()))
        return sentences == story.sentences and all(
            _size(folder / name) == size for name, size in written["files"].items()
        )

    def write(
        self,
        story: SplitStory,
        example: Example,
        generated: Mapping[str, UInt8[np.ndarray, "f h w 3"]],
        *,
        seed: int,
        given: int,
    ) -> None:
        """Write a story.

        Args:
            generated: images by the first word of their files' names, among them `frame`.
            given: how many of the first frames were given to the model.

        Raises:
            UserError: where the story cannot be written.
        """
        folder = self.place(story)
        with atomic_path(folder) as temporary:
            shutil.rmtree(folder, ignore_errors=True)  # one with a missing file
            temporary.mkdir()
            for i, original in enumerate(example.images):
                Image.fromarray(original).save(temporary / f"original_{i}.png")
            for name, images in generated.items():
                save_frames(temporary, images, story.sentences, [seed] * len(images), name)
            figure(story.sentences, example.images, generated["frame"]).save(
                temporary / "figure.png"
            )
            text = "".join(f"{sentence}\n" for sentence in story.sentences)
            (temporary / "text.txt").write_text(text, encoding="utf-8")
            files = {file.name: _size(file) for file in sorted(temporary.iterdir())}
            records = self._records(story, example, given)
            write_json(temporary / "story.json", {"files": files, "frames": records})

    def _records(self, story: SplitStory, example: Example, given: int) -> list[dict[str, Any]]:
        place = self.place(story).relative_to(self.folder).as_posix()
        records = []
        for i in range(FRAMES):
            label = example.labels[i] if example.labels else None
            records.append(
                {
                    "story": story.id,
                    "position": i,
                    "id": example.frame_ids[i],
                    "source_id": story.source_ids[i],
                    "sentence": story.sentences[i],
                    "generated": f"{place}/frame_{i}.png",
                    "original": f"{place}/original_{i}.png",
                    "given": i < given,
                    "characters": sorted(label.characters) if label else None,
                    "scene": label.scene if label else None,
                    "needs_context": label.needs_context if label else None,
                }
            )
        return records

    def records(self, story: SplitStory) -> list[dict[str, Any]]:
        """A record a frame of a story. Raises `UserError` where the story is not there."""
        folder = self.place(story)
        written = _read(folder / "story.json")
        require(bool(written), f"{folder} is not there; all processes must write to one folder")
        return written["frames"]

    def images(self, story: SplitStory, name: str) -> UInt8[np.ndarray, "f h w 3"]:
        """The images of a story whose files' names begin with a word, such as `original`."""
        folder = self.place(story)
        return np.stack([_image(folder / f"{name}_{i}.png") for i in range(FRAMES)])

    def clear(self, numbers: Iterable[int]) -> None:
        """Remove what was left half-written of stories, by a process that was killed."""
        beginnings = {f".{number:05d}" for number in numbers}
        for left in (self.folder / "stories").glob(".*-*"):
            if left.name.split("-")[0] in beginnings:
                shutil.rmtree(left, ignore_errors=True)


def figure(
    sentences: Sequence[str],
    originals: UInt8[np.ndarray, "f h w 3"],
    generated: UInt8[np.ndarray, "f h w 3"],
) -> Image.Image:
    """The sentences over a row of originals over a row of generated frames."""
    font = ImageFont.load_default(FONT_SIZE)
    width = len(originals) * SIDE
    lines = [line for sentence in sentences for line in _wrap(sentence, font, width - 2 * MARGIN)]
    line_height = int(font.getbbox("Ag")[3]) + MARGIN
    top = max(TEXT_HEIGHT, MARGIN + len(lines) * line_height)
    canvas = Image.new("RGB", (width, top + 2 * SIDE), "white")
    text = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        text.text((MARGIN, MARGIN + i * line_height), line, fill="black", font=font)
    for row, images in enumerate((originals, generated)):
        for column, image in enumerate(images):
            small = Image.fromarray(image).resize((SIDE, SIDE))
            canvas.paste(small, (column * SIDE, top + row * SIDE))
    return canvas


def _wrap(sentence: str, font: Font, width: int) -> list[str]:
    """The lines of a sentence, of at most `width` pixels where words are no wider."""
    lines: list[str] = []
    for word in sentence.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _read(path: Path) -> dict[str, Any]:
    """The values of a JSON file, none where it is missing or broken."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _image(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    with Image.open(path) as image:
        return np.asarray(image)
