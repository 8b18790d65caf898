"""Measure preparing and reading stories against Pillow alone, on the same images.

    python scripts/benchmark_data.py

Rates are images a second of one core's time, so that other work on the machine counts little:
each is the median of some rounds, in which all take turns. Targets: preparing and reading at three
quarters of what Pillow alone decodes and resizes, and reading at 350 images a second on two
cores. Preparing also writes what it makes, and what a kernel takes to find room for a new file's
pages differs much between machines: the second line says what Pillow and one plain file take here.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from contextualstory_jax.config.train_config import DataConfig
from contextualstory_jax.data.shapes import story
from contextualstory_jax.utils.cli import ArgumentParser, run

FRAMES, BATCH = 5, 12  # of a story; stories
RAW = "group_size:1,uncompressed"  # as `prepare` writes
ENCODINGS = {"raw": RAW, "raw, zstd:1": "group_size:1,zstd:1", "raw, zstd:3": "group_size:1"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; prints a table."""
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        paths = write_stories(root / "published", arguments.stories, arguments.picture)
        rates = measure(root, paths, arguments.size, arguments.rounds)
        encodings = measure_encodings(root, paths[:40], arguments.size)
    print(f"{len(paths)} PNGs of {arguments.picture} pixels a side, brought to {arguments.size}\n")
    for name, rate in rates.items():
        print(f"{name:34}{rate:8.0f} images/s a core {rate / rates['Pillow alone']:8.2f} of Pillow")
    print(f"\n{'an image in a shard, as':34}{'KiB':>8}{'write ms':>12}{'read ms':>12}")
    for name, (size, write, read) in encodings.items():
        print(f"{name:34}{size:8.0f}{write:12.2f}{read:12.2f}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = ArgumentParser(description="Measure preparing and reading against Pillow alone.")
    parser.add_argument("--stories", type=int, default=120, metavar="N", help="of five (120)")
    parser.add_argument(
        "--picture", type=int, default=256, metavar="N", help="pixels a side, published (256)"
    )
    parser.add_argument(
        "--size", type=int, default=256, metavar="N", help="pixels a side, prepared (256)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="to take turns in (3)")
    return parser.parse_args(argv)


def write_stories(root: Path, count: int, size: int) -> list[Path]:
    """A folder of stories whose images are as busy as a cartoon's, and their paths."""
    root.mkdir()
    rng = np.random.default_rng(0)
    light = 1 + 0.15 * np.outer(np.sin(np.linspace(0, 6, size)), np.cos(np.linspace(0, 5, size)))
    lines, paths = [], []
    for number in range(count):
        drawn = story(0, number, "train", size)
        names = [f"{frame_id}.png" for frame_id in drawn.frame_ids]
        for name, picture in zip(names, drawn.images, strict=True):
            lit = picture * light[..., None] + rng.normal(0, 4, picture.shape)
            buffer = io.BytesIO()  # videos leave such traces
            Image.fromarray(lit.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
            Image.open(buffer).save(root / name)
        line = {"id": drawn.story_id, "sentences": list(drawn.sentences), "frames": names}
        lines.append(json.dumps(line))
        paths += [root / name for name in names]
    (root / "stories.jsonl").write_text("\n".join(lines))
    return paths


def measure(root: Path, paths: list[Path], size: int, rounds: int) -> dict[str, float]:
    """Images a second of processor time, by what is done with them."""
    from contextualstory_jax.data.loader import TokenizedStories, batches, open_stories
    from contextualstory_jax.data.preparation import prepare

    published = DataConfig(name="folder", root=str(root / "published"))
    prepared = DataConfig(name="folder", root=str(root / "out"))

    def resized() -> Iterator[np.ndarray]:
        for path in paths:
            with Image.open(path) as image:
                image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
                yield np.asarray(image)

    def pillow() -> None:
        for _ in resized():
            pass

    def pillow_to_file() -> None:
        (root / "again").mkdir()
        with (root / "again/pictures").open("wb") as file:
            for picture in resized():
                file.write(picture.data)

    def prepare_anew() -> None:
        prepare(published, root / "again", size)

    def read(config: DataConfig) -> None:
        source = open_stories(config, "train", size)
        steps = math.ceil(len(source) / BATCH)
        blank = np.zeros((FRAMES, 77), np.int32)
        order = batches(TokenizedStories(source, lambda sentences: blank), BATCH, 0)
        for _ in range(steps):
            next(order)

    tasks: dict[str, Callable[[], None]] = {
        "Pillow alone": pillow,
        "Pillow, and a plain file": pillow_to_file,
        "preparing": prepare_anew,
        "reading, prepared": lambda: read(prepared),
        "reading, published": lambda: read(published),
    }
    prepare(published, root / "out", size)  # what is imported then does not count
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            began = time.process_time()
            task()
            seconds[name].append(time.process_time() - began)
            shutil.rmtree(root / "again", ignore_errors=True)
    return {name: len(paths) / statistics.median(taken) for name, taken in seconds.items()}


def measure_encodings(
    root: Path, paths: list[Path], size: int
) -> dict[str, tuple[float, float, float]]:
    """KiB an image, and milliseconds to write and to read one, by encoding."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    pictures = []
    for path in paths:
        with Image.open(path) as image:
            pictures.append(np.asarray(image.convert("RGB").resize((size, size))))

    def to_png(picture: np.ndarray, level: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG", compress_level=level)
        return buffer.getvalue()

    def of_png(record: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(record)))

    codecs: dict[str, tuple[str, Callable, Callable]] = {
        name: (options, np.ndarray.tobytes, lambda record: np.frombuffer(record, np.uint8))
        for name, options in ENCODINGS.items()
    }
    for level in (1, 6):
        codecs[f"PNG, level {level}"] = (RAW, lambda p, n=level: to_png(p, n), of_png)

    found = {}
    for name, (options, encode, decode) in codecs.items():
        path = str(root / "records")
        began = time.process_time()
        writer = ArrayRecordWriter(path, options)
        for picture in pictures:
            writer.write(encode(picture))
        writer.close()
        written = time.process_time()
        reader = ArrayRecordReader(path, "readahead_buffer_size:0")
        for number in range(len(pictures)):
            decode(reader.read([number])[0])
        read = time.process_time()
        scale = 1000 / len(pictures)
        kib = os.path.getsize(path) / 1024 / len(pictures)
        found[name] = (kib, (written - began) * scale, (read - written) * scale)
    return found


if __name__ == "__main__":
    run(main)
